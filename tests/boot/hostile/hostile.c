/* A guest without an operating system that does its worst. Started by PVH; the command line names what to do.
 *
 * Every act ends with a line on the serial port and power-off, unless its point is never to end.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__asm__(".section .note.Xen, \"a\", @note\n"
        ".long 4, 4, 18\n"
        ".asciz \"Xen\"\n"
        ".long start\n"
        ".text\n"
        ".globl start\n"
        "start: mov $stack_top, %esp\n"
        "push %ebx\n"
        "call run\n"
        ".bss\n"
        ".align 16\n"
        ".skip 16384\n"
        "stack_top:\n"
        ".text\n");

enum { SERIAL = 0x3F8, SLEEP = 0x600, VIRTIO = 0xC0000000u, STEP = 0x1000, SLOTS = 18 };
enum { DESC = 0x1000000, AVAIL = 0x1010000, USED = 0x1020000, DATA = 0x1030000, INDIRECT = 0x1040000 };

struct desc {
    u64 gpa;
    u32 size;
    u16 flags, next;
};

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline void write32(u32 gpa, u32 value) { *(volatile u32 *)gpa = value; }
static inline u32 read32(u32 gpa) { return *(volatile u32 *)gpa; }

static void print(const char *text)
{
    while (*text)
        outb(SERIAL, *text++);
}

static void number(u32 value)
{
    char digits[12], *at = digits + 11;
    *at = 0;
    do
        *--at = '0' + value % 10;
    while (value /= 10);
    print(at);
}

static u32 seed = 0x12345678;
static u32 any(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed;
}

static int says(const char *line, const char *word)
{
    for (; *line; line++) {
        const char *a = line, *b = word;
        while (*b && *a == *b)
            a++, b++;
        if (!*b)
            return 1;
    }
    return 0;
}

static _Noreturn void power_off(void)
{
    print("done\n");
    for (;;)
        outb(SLEEP, 0x20 | 5 << 2);
}

static u32 device_id(u32 slot)
{
    u32 base = VIRTIO + slot * STEP;
    return read32(base) == 0x74726976 ? read32(base + 8) : 0;
}

/* Reset, negotiate everything that is offered, give every queue the same three areas of memory. */
static void driver(u32 base, u32 queue_size)
{
    write32(base + 0x70, 0);
    write32(base + 0x70, 1);
    write32(base + 0x70, 3);
    for (u32 half = 0; half < 2; half++) {
        write32(base + 0x14, half);
        write32(base + 0x24, half);
        write32(base + 0x20, read32(base + 0x10));
    }
    write32(base + 0x70, 11);
    for (u32 queue = 0; queue < 8; queue++) {
        write32(base + 0x30, queue);
        u32 max = read32(base + 0x34);
        if (!max)
            break;
        write32(base + 0x38, queue_size < max ? queue_size : max);
        write32(base + 0x80, DESC), write32(base + 0x84, 0);
        write32(base + 0x90, AVAIL), write32(base + 0x94, 0);
        write32(base + 0xA0, USED), write32(base + 0xA4, 0);
        write32(base + 0x44, 1);
    }
    write32(base + 0x70, 15);
}

static void clear_rings(void)
{
    for (u32 gpa = DESC; gpa < INDIRECT + 0x10000; gpa += 4)
        write32(gpa, 0);
}

static void fill(u32 kind, struct desc *table, u32 count)
{
    for (u32 i = 0; i < count; i++) {
        struct desc d = {DATA, 64, 1, (u16)(i + 1)};
        switch (kind) {
        case 0: d.next = (u16)i; break;                                          /* points to itself */
        case 1: d.next = (u16)(count - 1 - i); break;                            /* goes round in circles */
        case 2: d.next = 0xFFFF; break;                                          /* leaves the table */
        case 3: d.gpa = 0xFFFFFFFFFFFFFFF0ull; d.size = 0x100; d.flags = 0; break; /* wraps */
        case 4: d.gpa = 0xC0000000; d.flags = 2; break;                          /* device memory */
        case 5: d.size = 0xFFFFFFFF; d.flags = i & 1 ? 1 : 3; break;             /* 4 GiB each, all mixed */
        case 6: d.gpa = INDIRECT; d.size = 0xFFFFFFF0; d.flags = 4; break;       /* an endless indirect table */
        case 7: d.gpa = DESC; d.size = 16 * count; d.flags = 4; break;           /* a table that is its own indirect one */
        case 8: d.size = 0; d.flags = 0; break;                                  /* nothing */
        case 9: d.gpa = USED; d.size = 4096; d.flags = 2; break;                 /* overwrite the ring itself */
        default: d.gpa = (u64)any() << (any() & 31); d.size = any(); d.flags = (u16)any(); d.next = (u16)any(); break;
        }
        table[i] = d;
    }
}

static void rings(void)
{
    u32 broken = 0;
    for (u32 slot = 0; slot < SLOTS; slot++) {
        if (!device_id(slot))
            continue;
        u32 base = VIRTIO + slot * STEP;
        for (u32 kind = 0; kind < 40; kind++) {
            clear_rings();
            fill(kind, (struct desc *)DESC, 64);
            fill(kind, (struct desc *)INDIRECT, 64);
            volatile u16 *avail = (volatile u16 *)AVAIL;
            for (u32 i = 0; i < 64; i++)
                avail[2 + i] = kind > 30 ? (u16)any() : (u16)i;
            driver(base, 64);
            avail[1] = kind % 5 == 4 ? (u16)any() : 64;
            for (u32 queue = 0; queue < 8; queue++)
                write32(base + 0x50, queue);
            for (u32 spin = 0; spin < 2000; spin++)
                if (read32(base + 0x70) & 0x40) {
                    broken++;
                    break;
                }
        }
        write32(base + 0x70, 0);
    }
    print("broken ");
    number(broken);
    print("\n");
    power_off();
}

/* Anything to any register of anything, in every size. */
static void registers(void)
{
    for (u32 round = 0; round < 30000; round++) {
        u32 gpa = VIRTIO + any() % ((SLOTS + 2) * STEP), value = any();
        if (!(value & 0x700))
            value &= 0x7F;
        switch (any() % 6) {
        case 0: *(volatile u8 *)gpa = (u8)value; break;
        case 1: *(volatile u16 *)(gpa & ~1u) = (u16)value; break;
        case 2: value = read32(gpa & ~3u); break;
        default: *(volatile u32 *)(gpa & ~3u) = value; break;
        }
        if (round % 3 == 0) {
            u32 pin = any();
            write32(0xFEC00000, pin & 0xFF), write32(0xFEC00010, any());
            u16 port = (u16)(pin >> 8);
            if (port < 0x600 || port > 0x602) {
                if (port != 0x64)
                    outb(port, (u8)value);
                inb(port);
            }
        }
        if (round % 64 == 0)
            for (u32 slot = 0; slot < SLOTS; slot++)
                if (any() & 1)
                    driver(VIRTIO + slot * STEP, 1u << any() % 12);
    }
    for (u32 port = SERIAL + 1; port < SERIAL + 5; port++)
        outb((u16)port, 0);
    power_off();
}

/* The socket device's queues: what the guest sends goes nowhere, is never read, or asks for more. */
struct packet {
    u64 src_cid, dst_cid;
    u32 src_port, dst_port, len;
    u16 type, op;
    u32 flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

static void vsock(void)
{
    for (u32 slot = 0; slot < SLOTS; slot++) {
        if (device_id(slot) != 19)
            continue;
        u32 base = VIRTIO + slot * STEP;
        clear_rings();
        driver(base, 64);
        struct desc *table = (struct desc *)DESC;
        struct packet *packets = (struct packet *)DATA;
        volatile u16 *avail = (volatile u16 *)AVAIL, *used = (volatile u16 *)USED;
        u16 sent = 0;
        for (u32 round = 0; round < 4000; round++) {
            for (u32 i = 0; i < 32; i++) {
                struct packet p = {3, 2, 1000 + (round * 32 + i) % 5000, any() % 2 ? 1024 : any(), 0, 1, 1, 0, 0, 0};
                u32 size = sizeof p;
                switch (any() % 8) {
                case 0: p.op = (u16)any(); break;
                case 1: p.op = 5, p.len = any(); break;
                case 2: p.op = 5, p.len = 4000, size += 4000; break;
                case 3: p.src_cid = any(), p.dst_cid = any(); break;
                case 4: p.type = (u16)any(); break;
                case 5: p.buf_alloc = any(), p.fwd_cnt = any(); break;
                default: break;
                }
                packets[i] = p;
                table[i] = (struct desc){(u64)(u32)&packets[i], size, 0, 0};
                avail[2 + (u16)(sent + i) % 64] = (u16)i;
            }
            sent += 32;
            avail[1] = sent;
            write32(base + 0x50, 1);
            for (u32 spin = 0; used[1] != sent && spin < 1000000; spin++)
                if (!(spin & 0xFFF) && read32(base + 0x70) & 0x40)
                    driver(base, 64), sent = 0, avail[1] = used[1] = 0;
        }
        print("flooded\n");
    }
    power_off();
}

/* The same 32 KiB, printed on the virtio console for ever. */
static void console(void)
{
    for (u32 slot = 0; slot < SLOTS; slot++) {
        if (device_id(slot) != 3)
            continue;
        u32 base = VIRTIO + slot * STEP;
        clear_rings();
        driver(base, 64);
        volatile u16 *avail = (volatile u16 *)AVAIL, *used = (volatile u16 *)USED;
        for (u32 i = 0; i < 64; i++) {
            ((struct desc *)DESC)[i] = (struct desc){0x1100000, 32768, 0, 0};
            avail[2 + i] = (u16)i;
        }
        for (u16 sent = 1;; sent++) {
            avail[1] = sent;
            write32(base + 0x50, 1);
            while (used[1] != sent)
                ;
        }
    }
}

struct start_info {
    u32 magic, version, flags, modules;
    u64 modlist, cmdline;
};

void run(struct start_info *info)
{
    const char *line = (const char *)(u32)info->cmdline;
    if (says(line, "act=registers"))
        registers();
    if (says(line, "act=rings"))
        rings();
    if (says(line, "act=vsock"))
        vsock();
    if (says(line, "act=console"))
        console();
    if (says(line, "act=serial"))
        for (;;)
            print("never again will I write so much to a serial port; ");
    if (says(line, "act=halt"))
        for (;;)
            __asm__ volatile("cli; hlt");
    if (says(line, "act=loop"))
        for (;;)
            __asm__ volatile("");
    if (says(line, "act=fault")) {
        static const struct {
            u16 limit;
            u32 base;
        } __attribute__((packed)) none = {0, 0};
        __asm__ volatile("lidt %0; ud2" : : "m"(none));
    }
    if (says(line, "act=tss")) {
        /* A task register that points past the end of RAM, and a fault that needs it. */
        static const struct {
            u16 limit;
            u32 base;
        } __attribute__((packed)) idt = {0x7FF, 0xBFFFF000};
        __asm__ volatile("lidt %0; int3" : : "m"(idt));
    }
    print("hello\n");
    power_off();
}
