/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Making a PC processor out of the unicorn library (GPL-2.0, QEMU's TCG).
 *
 * The library executes instructions well but leaves out what a whole system needs: exceptions are not vectored, SYSCALL
 * does nothing, ports are open to user mode, MSRs and the TSC cannot be ours, self-modifying code through a second
 * mapping runs stale, and a guest can abort the process. All of that lives in functions the shared library exports and
 * reaches through its relocation table. This object is loaded RTLD_GLOBAL first, so that the same names here take their
 * place (ELF symbol interposition); no code is patched. The originals are found with dlsym on the library's handle.
 *
 * The replaced functions serve only the engine that the calling thread runs (`current`), so other users of unicorn in
 * the process are not disturbed. Structure offsets are those of release 2.1.4 for x86-64; engine_open() checks them
 * against the live engine, through its public register calls, and refuses the library if one differs.
 *
 * Interrupts go in at block boundaries: `cpu_exec_interrupt` of the engine's class is ours. Whoever wants the running
 * thread's attention ORs a bit into `interrupt_request` and sets the high half of the instruction counter to -1, which
 * the next block start notices; nothing is ever stopped in mid-block, because the library's own asynchronous stop rolls
 * back half-done instructions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "soft.h"

/* struct uc_struct */
#define UC_CPU 440
#define UC_NO_EXIT_REQUEST 2034
#define UC_INIT_DONE 2035
#define UC_CONTEXT_SIZE 2016
#define UC_STOP_REQUEST 1389
/* X86CPU */
#define CPU_EXIT_REQUEST 21
#define CPU_INTERRUPT_REQUEST 28
#define CPU_ENV_PTR 296
#define CPU_MEM_IO_PC 33144 /* where in the translated code the access to MMIO is */
#define CPU_HALTED 33176
#define CPU_EXCEPTION_INDEX 33184
#define CPU_UC 33192
#define CPU_ICOUNT_DECR 35392
#define CPU_ENV 35408
#define CPU_CLASS 42768
#define CLASS_DO_INTERRUPT 16
#define CLASS_EXEC_INTERRUPT 144
/* CPUX86State */
#define ENV_REGS 0
#define ENV_RIP 128
#define ENV_EFLAGS 136
#define ENV_CC_SRC 152
#define ENV_CC_OP 168
#define ENV_DF 172
#define ENV_HFLAGS 176
#define ENV_HFLAGS2 180
#define ENV_SEGS 184 /* es cs ss ds fs gs: selector, base, limit, flags; 24 bytes each */
#define ENV_LDT 328
#define ENV_TR 352
#define ENV_GDT 376
#define ENV_IDT 400
#define ENV_CR 424
#define ENV_A20 496
#define ENV_EFER 592
#define ENV_FPSTT 604
#define ENV_FPUS 608
#define ENV_FPUC 610
#define ENV_FPTAGS 612
#define ENV_FPREGS 624
#define ENV_MXCSR 816
#define ENV_XMM 824
#define ENV_STAR 4824
#define ENV_LSTAR 4840
#define ENV_FMASK 4856
#define ENV_TSC_AUX 4896
#define ENV_XCR0 4904
#define ENV_MISC_ENABLE 4920
#define ENV_PAT 5280
#define ENV_ERROR_CODE 5384
#define ENV_DR 5400
#define ENV_BREAKPOINTS 5464 /* the engine's objects behind DR0-DR3 */
#define ENV_OLD_EXCEPTION 5496
#define ENV_UC 7000

#define U8(base, offset) (*(uint8_t *)((base) + (offset)))
#define U16(base, offset) (*(uint16_t *)((base) + (offset)))
#define U32(base, offset) (*(uint32_t *)((base) + (offset)))
#define U64(base, offset) (*(uint64_t *)((base) + (offset)))
#define PTR(base, offset) (*(uint8_t **)((base) + (offset)))
#define CONST_U32(base, offset) (*(const uint32_t *)((base) + (offset)))
#define CONST_U64(base, offset) (*(const uint64_t *)((base) + (offset)))

enum { RAX, RCX, RDX, RBX };
enum { ES, CS, SS, DS, FS, GS };

#define CC_MASK 0x8D5u
#define FLAG_DF 0x400u
#define FLAG_IF 0x200u
#define FLAG_RF 0x10000u
#define FLAG_VM 0x20000u
#define CC_OP_EFLAGS 1
#define HF_CPL 3u
#define HF_INHIBIT_IRQ 8u
#define HF_CS64 0x8000u
#define HF_SMAP (1u << 23)
#define HF_OSFXSR (1u << 22)
#define HF2_GIF 1u
#define HF2_NMI 4u
#define CR4_TSD 4u
#define EXCP_HLT 0x10001
#define EXCP_INTERRUPT 0x10000
#define MMU_KERNEL 2
#define GP_FAULT 13

#define CTL_WRITE(type, args) ((type) | ((args) << 26) | (1u << 30))
#define CTL_USE_EXITS 4
#define CTL_TCG_BUFFER_SIZE 13
#define UC_HOOK_INTR 1
#define UC_HOOK_MEM_WRITE_PROT 256
#define UC_HOOK_INSN_INVALID (1 << 14)
#define UC_VERSION_EXPECTED 0x020104FFu
/* uc_x86_reg */
enum { REG_RAX = 35, REG_FPCW = 246, REG_MXCSR = 249 };

__thread Partition *current __attribute__((tls_model("initial-exec"), visibility("hidden")));

static struct {
    void *handle;
    unsigned (*version)(unsigned *, unsigned *);
    int (*open)(int, int, uint8_t **);
    int (*close)(uint8_t *);
    int (*emu_start)(uint8_t *, uint64_t, uint64_t, uint64_t, size_t);
    int (*emu_stop)(uint8_t *);
    int (*mem_map_ptr)(uint8_t *, uint64_t, uint64_t, uint32_t, void *);
    int (*mem_unmap)(uint8_t *, uint64_t, uint64_t);
    int (*mmio_map)(uint8_t *, uint64_t, uint64_t, void *, void *, void *, void *);
    int (*hook_add)(uint8_t *, size_t *, int, void *, void *, uint64_t, uint64_t, ...);
    int (*hook_del)(uint8_t *, size_t);
    int (*ctl)(uint8_t *, uint32_t, ...);
    int (*reg_write)(uint8_t *, int, const void *);
    int (*reg_read)(uint8_t *, int, void *);
    size_t (*context_size)(uint8_t *);
    const char *(*strerror)(int);
    /* internals */
    void (*do_interrupt)(uint8_t *cpu);
    int (*exec_interrupt)(uint8_t *cpu, int request);
    void (*hardirq)(uint8_t *env, int vector, int is_hw);
    void (*raise_err_ra)(uint8_t *env, int vector, int code, uintptr_t ra) __attribute__((noreturn));
    void (*loop_exit)(uint8_t *cpu) __attribute__((noreturn));
    void (*loop_exit_restore)(uint8_t *cpu, uintptr_t ra) __attribute__((noreturn));
    uint32_t (*cc_all)(uint8_t *env, int op);
    void (*tlb_flush)(uint8_t *cpu);
    uint64_t (*ram_from_host)(uint8_t *uc, void *hva);
    uint64_t (*phys_page)(uint8_t *cpu, uint64_t gva, void *attrs);
    void *(*find_mapping)(uint8_t *uc, uint64_t gpa);
    void (*set_readonly)(void *mapping, int readonly);
    uint32_t (*lduw)(uint8_t *env, uint64_t gva, int mode, uintptr_t ra);
    void (*cpuid)(uint8_t *env, uint32_t leaf, uint32_t sub, uint32_t *, uint32_t *, uint32_t *, uint32_t *);
    void (*update_dr7)(uint8_t *env, uint32_t value);
    void (*update_mxcsr)(uint8_t *env);
    void (*update_fp)(uint8_t *env);
    /* originals of what is replaced below */
    void (*old_rdmsr)(uint8_t *);
    void (*old_wrmsr)(uint8_t *);
    void (*old_rdtsc)(uint8_t *);
    void (*old_rdtscp)(uint8_t *);
    void (*old_cpuid)(uint8_t *);
    void (*old_syscall)(uint8_t *, int);
    void (*old_pause)(uint8_t *, int);
    uint64_t (*old_ld[7])(uint8_t *, uint64_t, uint32_t, uintptr_t);
    void (*old_st[7])(uint8_t *, uint64_t, uint64_t, uint32_t, uintptr_t);
    uint64_t (*old_in[3])(uint8_t *, uint32_t);
    void (*old_out[3])(uint8_t *, uint32_t, uint32_t);
    uint64_t (*old_read_cr)(uint8_t *, int);
    void (*old_write_cr)(uint8_t *, int, uint64_t);
    void (*old_reset_request)(uint8_t *);
    void (*old_abort)(uint8_t *, const char *, ...);
} lib;

#define CALLER ((uintptr_t)__builtin_extract_return_addr(__builtin_return_address(0)))
#define OURS(env_) (current && current->env == (env_))

/* ---- loading ---- */

struct symbol {
    void **slot;
    const char *name;
};

/* The library ends the process where it finds itself inconsistent, and a guest can bring that about with instructions
 * its translator does not foresee. Its calls of abort() and exit() come here instead: the C library stands before us
 * in the order of lookup, so interposition does not reach these two, but their slots in the library's table of imports
 * are data. The engine is left as it stands, by a jump past all of its frames, and never runs again. */
static void gave_up(void)
{
    Partition *p = current;
    if (!p)
        abort();
    p->broken = 1;
    partition_crash(p, STOP_ABORT, "the software CPU met an instruction that it cannot translate");
    longjmp(p->escape, 1);
}

static void gave_up_with(int status)
{
    if (!current)
        exit(status);
    gave_up();
}

static int redirect_aborts(void *handle)
{
    struct link_map *map;
    const Elf64_Rela *entries = NULL;
    const Elf64_Sym *symbols = NULL;
    const char *names = NULL;
    uint64_t size = 0;
    int found = 0;
    if (dlinfo(handle, RTLD_DI_LINKMAP, &map))
        return -1;
    for (const Elf64_Dyn *d = map->l_ld; d->d_tag != DT_NULL; d++) {
        if (d->d_tag == DT_JMPREL)
            entries = (const Elf64_Rela *)d->d_un.d_ptr;
        else if (d->d_tag == DT_PLTRELSZ)
            size = d->d_un.d_val;
        else if (d->d_tag == DT_SYMTAB)
            symbols = (const Elf64_Sym *)d->d_un.d_ptr;
        else if (d->d_tag == DT_STRTAB)
            names = (const char *)d->d_un.d_ptr;
    }
    if (!entries || !symbols || !names)
        return -1;
    for (uint64_t i = 0; i < size / sizeof *entries; i++) {
        const char *name = names + symbols[ELF64_R_SYM(entries[i].r_info)].st_name;
        void **slot = (void **)(map->l_addr + entries[i].r_offset);
        if (!strcmp(name, "abort")) {
            *slot = (void *)gave_up;
            found++;
        } else if (!strcmp(name, "exit")) {
            *slot = (void *)gave_up_with;
        }
    }
    return found ? 0 : -1;
}

int engine_load(const char *library, char *message, size_t size)
{
    const struct symbol symbols[] = {
        {(void **)&lib.version, "uc_version"},
        {(void **)&lib.open, "uc_open"},
        {(void **)&lib.close, "uc_close"},
        {(void **)&lib.emu_start, "uc_emu_start"},
        {(void **)&lib.emu_stop, "uc_emu_stop"},
        {(void **)&lib.mem_map_ptr, "uc_mem_map_ptr"},
        {(void **)&lib.mem_unmap, "uc_mem_unmap"},
        {(void **)&lib.mmio_map, "uc_mmio_map"},
        {(void **)&lib.hook_add, "uc_hook_add"},
        {(void **)&lib.hook_del, "uc_hook_del"},
        {(void **)&lib.ctl, "uc_ctl"},
        {(void **)&lib.reg_write, "uc_reg_write"},
        {(void **)&lib.reg_read, "uc_reg_read"},
        {(void **)&lib.context_size, "uc_context_size"},
        {(void **)&lib.strerror, "uc_strerror"},
        {(void **)&lib.do_interrupt, "x86_cpu_do_interrupt_x86_64"},
        {(void **)&lib.exec_interrupt, "x86_cpu_exec_interrupt_x86_64"},
        {(void **)&lib.hardirq, "do_interrupt_x86_hardirq_x86_64"},
        {(void **)&lib.raise_err_ra, "raise_exception_err_ra_x86_64"},
        {(void **)&lib.loop_exit, "cpu_loop_exit_x86_64"},
        {(void **)&lib.loop_exit_restore, "cpu_loop_exit_restore_x86_64"},
        {(void **)&lib.cc_all, "cpu_cc_compute_all_x86_64"},
        {(void **)&lib.tlb_flush, "tlb_flush_x86_64"},
        {(void **)&lib.ram_from_host, "qemu_ram_addr_from_host_x86_64"},
        {(void **)&lib.phys_page, "x86_cpu_get_phys_page_attrs_debug_x86_64"},
        {(void **)&lib.find_mapping, "find_memory_mapping_x86_64"},
        {(void **)&lib.set_readonly, "memory_region_set_readonly_x86_64"},
        {(void **)&lib.lduw, "cpu_lduw_mmuidx_ra_x86_64"},
        {(void **)&lib.cpuid, "cpu_x86_cpuid_x86_64"},
        {(void **)&lib.update_dr7, "cpu_x86_update_dr7_x86_64"},
        {(void **)&lib.update_mxcsr, "update_mxcsr_status_x86_64"},
        {(void **)&lib.update_fp, "update_fp_status_x86_64"},
        {(void **)&lib.old_rdmsr, "helper_rdmsr_x86_64"},
        {(void **)&lib.old_wrmsr, "helper_wrmsr_x86_64"},
        {(void **)&lib.old_rdtsc, "helper_rdtsc_x86_64"},
        {(void **)&lib.old_rdtscp, "helper_rdtscp_x86_64"},
        {(void **)&lib.old_cpuid, "helper_cpuid_x86_64"},
        {(void **)&lib.old_syscall, "helper_syscall_x86_64"},
        {(void **)&lib.old_pause, "helper_pause_x86_64"},
        {(void **)&lib.old_ld[0], "helper_ret_ldub_mmu_x86_64"},
        {(void **)&lib.old_ld[1], "helper_le_lduw_mmu_x86_64"},
        {(void **)&lib.old_ld[2], "helper_le_ldul_mmu_x86_64"},
        {(void **)&lib.old_ld[3], "helper_le_ldq_mmu_x86_64"},
        {(void **)&lib.old_ld[4], "helper_be_lduw_mmu_x86_64"},
        {(void **)&lib.old_ld[5], "helper_be_ldul_mmu_x86_64"},
        {(void **)&lib.old_ld[6], "helper_be_ldq_mmu_x86_64"},
        {(void **)&lib.old_st[0], "helper_ret_stb_mmu_x86_64"},
        {(void **)&lib.old_st[1], "helper_le_stw_mmu_x86_64"},
        {(void **)&lib.old_st[2], "helper_le_stl_mmu_x86_64"},
        {(void **)&lib.old_st[3], "helper_le_stq_mmu_x86_64"},
        {(void **)&lib.old_st[4], "helper_be_stw_mmu_x86_64"},
        {(void **)&lib.old_st[5], "helper_be_stl_mmu_x86_64"},
        {(void **)&lib.old_st[6], "helper_be_stq_mmu_x86_64"},
        {(void **)&lib.old_in[0], "helper_inb_x86_64"},
        {(void **)&lib.old_in[1], "helper_inw_x86_64"},
        {(void **)&lib.old_in[2], "helper_inl_x86_64"},
        {(void **)&lib.old_out[0], "helper_outb_x86_64"},
        {(void **)&lib.old_out[1], "helper_outw_x86_64"},
        {(void **)&lib.old_out[2], "helper_outl_x86_64"},
        {(void **)&lib.old_read_cr, "helper_read_crN_x86_64"},
        {(void **)&lib.old_write_cr, "helper_write_crN_x86_64"},
        {(void **)&lib.old_reset_request, "qemu_system_reset_request"},
        {(void **)&lib.old_abort, "cpu_abort_x86_64"},
    };

    if (lib.handle)
        return 0;
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        snprintf(message, size, "the unicorn library cannot be loaded: %s", dlerror());
        return -1;
    }
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        *symbols[i].slot = dlsym(handle, symbols[i].name);
        if (!*symbols[i].slot) {
            snprintf(message, size, "this build of the unicorn library does not export %s", symbols[i].name);
            dlclose(handle);
            return -1;
        }
    }
    const char *missing;
    if (float_load(handle, &missing) || tlb_load(handle, &missing)) {
        snprintf(message, size, "this build of the unicorn library does not export %s", missing);
        dlclose(handle);
        return -1;
    }
    unsigned major = 0, minor = 0;
    if ((lib.version(&major, &minor) & 0xFFFFFF00u) != (UC_VERSION_EXPECTED & 0xFFFFFF00u)) {
        snprintf(message, size, "unicorn 2.1.4 is needed, this is %u.%u", major, minor);
        dlclose(handle);
        return -1;
    }
    if (redirect_aborts(handle)) {
        snprintf(message, size, "this build of the unicorn library does not show its imports");
        dlclose(handle);
        return -1;
    }
    lib.handle = handle;
    return 0;
}

/* ---- the replaced functions ---- */

/* IN and OUT need IOPL or a clear bit in the TSS's permission map. [SDM] 1 19.5 */
static void check_io(uint8_t *env, uint32_t port, uint32_t size, uintptr_t ra)
{
    uint32_t cpl = U32(env, ENV_HFLAGS) & HF_CPL;
    uint64_t flags = U64(env, ENV_EFLAGS);
    if (!(U64(env, ENV_CR) & 1) || (!(flags & FLAG_VM) && cpl <= ((flags >> 12) & 3)))
        return;
    uint8_t *tr = env + ENV_TR;
    uint32_t type = (U32(tr, 20) >> 8) & 0xF, limit = U32(tr, 16);
    if ((U32(tr, 20) & 0x8000) && (type & 0xD) == 9 && limit >= 103) {
        uint64_t base = U64(tr, 8);
        uint32_t offset = (lib.lduw(env, base + 0x66, MMU_KERNEL, ra) & 0xFFFF) + (port >> 3);
        if (offset + 1 <= limit) {
            uint32_t bits = lib.lduw(env, base + offset, MMU_KERNEL, ra) >> (port & 7);
            if (!(bits & ((1u << size) - 1)))
                return;
        }
    }
    lib.raise_err_ra(env, GP_FAULT, 0, ra);
}

/* An access the translated code cannot do by itself. Where accesses are handed out before they happen, this is where the
 * address and the place in the code are known (a write to read-only memory leaves no other trace of the latter). */
static __thread struct {
    uint64_t gva;
    uintptr_t ra;
} slow __attribute__((tls_model("initial-exec")));

/* Leave the instruction that `ra` is in unfinished. When it runs again, partition.c knows its access was done. */
static void abandon(uintptr_t ra)
{
    slow.ra = 0; /* for the next access, which may come from inside the processor */
    U32(current->cpu, CPU_EXCEPTION_INDEX) = EXCP_INTERRUPT;
    lib.loop_exit_restore(current->cpu, ra);
}

/* An access across a page comes once whole and then in pieces from the same place. Returns whether this is a whole. */
static int begin_access(uint64_t gva, uintptr_t ra)
{
    if (slow.ra == ra && gva - slow.gva + 8 < 16)
        return 0;
    slow.gva = gva;
    slow.ra = ra;
    return 1;
}

#define DEFINE_STORE_HELPER(name, slot, type)                                                                         \
    __attribute__((visibility("default"))) void name(uint8_t *env, uint64_t gva, type value, uint32_t oi, uintptr_t ra) \
    {                                                                                                                 \
        if (!OURS(env) || !current->exits) {                                                                          \
            lib.old_st[slot](env, gva, value, oi, ra);                                                                \
            return;                                                                                                   \
        }                                                                                                             \
        int whole = begin_access(gva, ra);                                                                            \
        lib.old_st[slot](env, gva, value, oi, ra);                                                                    \
        if (whole)                                                                                                    \
            slow.ra = 0;                                                                                              \
    }

DEFINE_STORE_HELPER(helper_ret_stb_mmu_x86_64, 0, uint8_t)
DEFINE_STORE_HELPER(helper_le_stw_mmu_x86_64, 1, uint16_t)
DEFINE_STORE_HELPER(helper_le_stl_mmu_x86_64, 2, uint32_t)
DEFINE_STORE_HELPER(helper_le_stq_mmu_x86_64, 3, uint64_t)
DEFINE_STORE_HELPER(helper_be_stw_mmu_x86_64, 4, uint16_t)
DEFINE_STORE_HELPER(helper_be_stl_mmu_x86_64, 5, uint32_t)
DEFINE_STORE_HELPER(helper_be_stq_mmu_x86_64, 6, uint64_t)

#define DEFINE_LOAD_HELPER(name, slot)                                                                                \
    __attribute__((visibility("default"))) uint64_t name(uint8_t *env, uint64_t gva, uint32_t oi, uintptr_t ra)       \
    {                                                                                                                 \
        if (!OURS(env) || !current->exits)                                                                            \
            return lib.old_ld[slot](env, gva, oi, ra);                                                                \
        int whole = begin_access(gva, ra);                                                                            \
        uint64_t value = lib.old_ld[slot](env, gva, oi, ra);                                                          \
        if (whole)                                                                                                    \
            slow.ra = 0;                                                                                              \
        return value;                                                                                                 \
    }

DEFINE_LOAD_HELPER(helper_ret_ldub_mmu_x86_64, 0)
DEFINE_LOAD_HELPER(helper_le_lduw_mmu_x86_64, 1)
DEFINE_LOAD_HELPER(helper_le_ldul_mmu_x86_64, 2)
DEFINE_LOAD_HELPER(helper_le_ldq_mmu_x86_64, 3)
DEFINE_LOAD_HELPER(helper_be_lduw_mmu_x86_64, 4)
DEFINE_LOAD_HELPER(helper_be_ldul_mmu_x86_64, 5)
DEFINE_LOAD_HELPER(helper_be_ldq_mmu_x86_64, 6)

#define DEFINE_PORT_HELPERS(suffix, slot, bytes, type)                                                                \
    __attribute__((visibility("default"))) uint64_t helper_in##suffix##_x86_64(uint8_t *env, uint32_t port)           \
    {                                                                                                                 \
        if (!OURS(env))                                                                                               \
            return lib.old_in[slot](env, port);                                                                       \
        check_io(env, port & 0xFFFF, bytes, CALLER);                                                                  \
        if (exit_before(current, EXIT_PIO_READ, port & 0xFFFF, bytes, 0))                                             \
            abandon(CALLER);                                                                                          \
        type value = (type)partition_pio_read(current, port & 0xFFFF, bytes);                                         \
        if (partition_callback_failed(current))                                                                       \
            abandon(CALLER);                                                                                          \
        return value;                                                                                                 \
    }                                                                                                                 \
    __attribute__((visibility("default"))) void helper_out##suffix##_x86_64(uint8_t *env, uint32_t port,              \
                                                                              uint32_t value)                         \
    {                                                                                                                 \
        if (!OURS(env)) {                                                                                             \
            lib.old_out[slot](env, port, value);                                                                      \
            return;                                                                                                   \
        }                                                                                                             \
        check_io(env, port & 0xFFFF, bytes, CALLER);                                                                  \
        if (exit_before(current, EXIT_PIO_WRITE, port & 0xFFFF, bytes, (type)value))                                  \
            abandon(CALLER);                                                                                          \
        partition_pio_write(current, port & 0xFFFF, bytes, (type)value);                                              \
        if (partition_callback_failed(current))                                                                       \
            abandon(CALLER);                                                                                          \
    }

DEFINE_PORT_HELPERS(b, 0, 1, uint8_t)
DEFINE_PORT_HELPERS(w, 1, 2, uint16_t)
DEFINE_PORT_HELPERS(l, 2, 4, uint32_t)

__attribute__((visibility("default"))) void helper_rdmsr_x86_64(uint8_t *env)
{
    if (!OURS(env)) {
        lib.old_rdmsr(env);
        return;
    }
    uint64_t value = 0;
    if (!engine_msr_read(current, (uint32_t)U64(env, RCX * 8), &value)) {
        if (exit_before(current, EXIT_MSR_READ, (uint32_t)U64(env, RCX * 8), 8, 0))
            abandon(CALLER);
        lib.raise_err_ra(env, GP_FAULT, 0, 0);
    }
    U64(env, RAX * 8) = (uint32_t)value;
    U64(env, RDX * 8) = value >> 32;
}

__attribute__((visibility("default"))) void helper_wrmsr_x86_64(uint8_t *env)
{
    if (!OURS(env)) {
        lib.old_wrmsr(env);
        return;
    }
    uint64_t value = (uint32_t)U64(env, RAX * 8) | U64(env, RDX * 8) << 32;
    if (!engine_msr_write(current, (uint32_t)U64(env, RCX * 8), value)) {
        if (exit_before(current, EXIT_MSR_WRITE, (uint32_t)U64(env, RCX * 8), 8, value))
            abandon(CALLER);
        lib.raise_err_ra(env, GP_FAULT, 0, 0);
    }
}

static void read_tsc(uint8_t *env, uintptr_t ra)
{
    if ((U64(env, ENV_CR + 32) & CR4_TSD) && (U32(env, ENV_HFLAGS) & HF_CPL))
        lib.raise_err_ra(env, GP_FAULT, 0, ra);
    uint64_t tsc = partition_tsc(current, current->loaded);
    U64(env, RAX * 8) = (uint32_t)tsc;
    U64(env, RDX * 8) = tsc >> 32;
}

__attribute__((visibility("default"))) void helper_rdtsc_x86_64(uint8_t *env)
{
    if (OURS(env))
        read_tsc(env, CALLER);
    else
        lib.old_rdtsc(env);
}

__attribute__((visibility("default"))) void helper_rdtscp_x86_64(uint8_t *env)
{
    if (!OURS(env)) {
        lib.old_rdtscp(env);
        return;
    }
    read_tsc(env, CALLER);
    U64(env, RCX * 8) = (uint32_t)U64(env, ENV_TSC_AUX);
}

__attribute__((visibility("default"))) void helper_cpuid_x86_64(uint8_t *env)
{
    uint32_t out[4];
    if (!OURS(env)) {
        lib.old_cpuid(env);
        return;
    }
    engine_cpuid(current, (uint32_t)U64(env, RAX * 8), (uint32_t)U64(env, RCX * 8), out);
    U64(env, RAX * 8) = out[0];
    U64(env, RBX * 8) = out[1];
    U64(env, RCX * 8) = out[2];
    U64(env, RDX * 8) = out[3];
}

static uint64_t flags_of(uint8_t *env)
{
    return (U64(env, ENV_EFLAGS) & ~(uint64_t)(CC_MASK | FLAG_DF)) | (lib.cc_all(env, (int)U32(env, ENV_CC_OP)) & CC_MASK) |
           (U32(env, ENV_DF) & FLAG_DF) | 2;
}

static void set_flags(uint8_t *env, uint64_t flags)
{
    U64(env, ENV_CC_SRC) = flags & CC_MASK;
    U32(env, ENV_CC_OP) = CC_OP_EFLAGS;
    U32(env, ENV_DF) = (flags & FLAG_DF) ? 0xFFFFFFFFu : 1;
    U64(env, ENV_EFLAGS) = flags & ~(uint64_t)(CC_MASK | FLAG_DF);
}

static void set_segment(uint8_t *env, int index, uint32_t selector, uint64_t base, uint32_t limit, uint32_t flags)
{
    uint8_t *segment = env + ENV_SEGS + 24 * index;
    U32(segment, 0) = selector;
    U64(segment, 8) = base;
    U32(segment, 16) = limit;
    U32(segment, 20) = flags;
}

/* [SDM] 2B SYSCALL, 64-bit mode (the library leaves it to a hook). From compatibility mode the target is CSTAR on AMD
 * and #UD on Intel; the CPUID vendor here is Intel. */
__attribute__((visibility("default"))) void helper_syscall_x86_64(uint8_t *env, int next_eip)
{
    if (!OURS(env)) {
        lib.old_syscall(env, next_eip);
        return;
    }
    if (!(U64(env, ENV_EFER) & 1) || !(U32(env, ENV_HFLAGS) & HF_CS64))
        lib.raise_err_ra(env, 6, 0, 0);
    uint64_t flags = flags_of(env);
    uint32_t selector = (U64(env, ENV_STAR) >> 32) & 0xFFFC;
    U64(env, RCX * 8) = U64(env, ENV_RIP) + next_eip;
    U64(env, 11 * 8) = flags & ~(uint64_t)FLAG_RF;
    set_flags(env, flags & ~(U64(env, ENV_FMASK) | FLAG_RF));
    set_segment(env, CS, selector, 0, 0xFFFFFFFFu, 0xA09B00);
    set_segment(env, SS, selector + 8, 0, 0xFFFFFFFFu, 0xC09300);
    U32(env, ENV_HFLAGS) = (U32(env, ENV_HFLAGS) & ~HF_CPL) | HF_CS64 | 0x30;
    U64(env, ENV_RIP) = U64(env, ENV_LSTAR);
}

__attribute__((visibility("default"))) void helper_pause_x86_64(uint8_t *env, int next_eip)
{
    if (!OURS(env)) {
        lib.old_pause(env, next_eip);
        return;
    }
    U64(env, ENV_RIP) += next_eip;
    partition_pause_hint(current);
    U32(current->cpu, CPU_EXCEPTION_INDEX) = EXCP_INTERRUPT;
    lib.loop_exit(current->cpu);
}

__attribute__((visibility("default"))) uint64_t helper_read_crN_x86_64(uint8_t *env, int reg)
{
    if (reg == 8 && OURS(env))
        return current->loaded->apic.tpr >> 4;
    return lib.old_read_cr(env, reg);
}

__attribute__((visibility("default"))) void helper_write_crN_x86_64(uint8_t *env, int reg, uint64_t value)
{
    if (reg == 8 && OURS(env)) {
        current->loaded->apic.tpr = (uint32_t)(value & 0xF) << 4;
        partition_rescan(current);
        return;
    }
    lib.old_write_cr(env, reg, value);
}

/* A triple fault asks the board for a reset. */
__attribute__((visibility("default"))) void qemu_system_reset_request(uint8_t *uc)
{
    Partition *p = current;
    if (p && p->uc == uc) {
        partition_crash(p, STOP_TRIPLE_FAULT, "triple fault");
        lib.emu_stop(uc);
    } else {
        lib.old_reset_request(uc);
    }
}

/* The library gives up by ending the process. A guest can get there (a user-mode fault with a broken TSS), so it ends
 * the guest instead. */
__attribute__((visibility("default"))) void cpu_abort_x86_64(uint8_t *cpu, const char *format, ...)
{
    Partition *p = current;
    char text[120];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (!p || p->cpu != cpu) {
        lib.old_abort(cpu, "%s", text);
        abort();
    }
    for (char *c = text; *c; c++)
        if (*c == '\n')
            *c = ' ';
    partition_crash(p, STOP_ABORT, text);
    U32(cpu, CPU_EXCEPTION_INDEX) = EXCP_HLT;
    lib.emu_stop(p->uc);
    lib.loop_exit(cpu);
}

/* ---- hooks ---- */

static void on_exception(uint8_t *uc, uint32_t vector, void *data)
{
    (void)uc;
    (void)vector;
    lib.do_interrupt(((Partition *)data)->cpu);
}

static int on_invalid_instruction(uint8_t *uc, void *data)
{
    (void)uc;
    lib.do_interrupt(((Partition *)data)->cpu);
    return 1;
}

/* Replaces the class's cpu_exec_interrupt: called at block boundaries while interrupt_request is not zero. Returns
 * whether control flow changed. */
static int exec_interrupt(uint8_t *cpu, int request)
{
    Partition *p = current;
    if (!p || p->cpu != cpu)
        return lib.exec_interrupt(cpu, request);
    if ((uint32_t)request & REQUEST_KICK) {
        engine_unrequest(p, REQUEST_KICK);
        partition_service(p);
        if (U8(p->uc, UC_STOP_REQUEST))
            return 0;
    }
    uint8_t *env = p->env;
    int exception;
    uint32_t code;
    if (exit_take_exception(p, &exception, &code))
        lib.raise_err_ra(env, exception, (int)code, 0);
    if (!(U32(env, ENV_HFLAGS2) & HF2_NMI) && partition_take_nmi(p)) {
        U32(env, ENV_HFLAGS2) |= HF2_NMI;
        lib.hardirq(env, 2, 1);
        return 1;
    }
    if (!engine_can_interrupt(env))
        return 0; /* HARD stays: asked again when IF or the shadow changes */
    int vector = partition_take_vector(p);
    if (vector < 0) {
        engine_unrequest(p, REQUEST_HARD);
        /* A vector posted between the look and the clearing brought its own KICK. */
        return 0;
    }
    lib.hardirq(env, vector, 1);
    return 1;
}

static uint64_t on_mmio_read(uint8_t *uc, uint64_t offset, unsigned size, void *base)
{
    (void)uc;
    if (!current)
        return 0; /* the host walks page tables that the guest has put outside memory: nothing is mapped there */
    if (exit_before(current, EXIT_MMIO_READ, (uint64_t)(uintptr_t)base + offset, size, 0))
        abandon(U64(current->cpu, CPU_MEM_IO_PC));
    return partition_mmio_read(current, (uint64_t)(uintptr_t)base + offset, size);
}

static void on_mmio_write(uint8_t *uc, uint64_t offset, unsigned size, uint64_t value, void *base)
{
    (void)uc;
    if (!current)
        return;
    if (exit_before(current, EXIT_MMIO_WRITE, (uint64_t)(uintptr_t)base + offset, size, value))
        abandon(U64(current->cpu, CPU_MEM_IO_PC));
    partition_mmio_write(current, (uint64_t)(uintptr_t)base + offset, size, value);
}

/* A store to a read-only mapping goes to the bus; returning true lets the engine go on (and drop it). */
static int on_write_protected(uint8_t *uc, int type, uint64_t gpa, int size, int64_t value, void *data)
{
    (void)uc;
    (void)type;
    if (exit_before((Partition *)data, EXIT_MMIO_WRITE, gpa, (uint32_t)size, (uint64_t)value)) {
        if (slow.ra)
            abandon(slow.ra);
        partition_crash((Partition *)data, STOP_ENGINE, "the processor itself wrote to read-only memory");
        return 1;
    }
    partition_mmio_write((Partition *)data, gpa, (uint32_t)size, (uint64_t)value);
    return 1;
}

/* ---- engine life ---- */

#define EXPECT(condition, what)                                                                                       \
    do {                                                                                                              \
        if (!(condition)) {                                                                                           \
            snprintf(message, size, "this build of the unicorn library is laid out differently (%s)", what);          \
            return -1;                                                                                                \
        }                                                                                                             \
    } while (0)

static int check_layout(Partition *p, char *message, size_t size)
{
    static const struct {
        int reg;
        int offset;
    } words[] = {{35, 0}, {38, 8}, {40, 16}, {37, 24}, {44, 32}, {36, 40}, {43, 48}, {39, 56}, {106, 64}, {113, 120}};
    uint8_t *uc = p->uc;
    EXPECT(p->cpu && p->env == p->cpu + CPU_ENV, "env");
    EXPECT(PTR(p->env, ENV_UC) == uc, "env->uc");
    EXPECT(PTR(p->cpu, CPU_UC) == uc, "cpu->uc");
    EXPECT(*(void **)(p->cpu + CPU_CLASS + CLASS_DO_INTERRUPT) == (void *)lib.do_interrupt, "do_interrupt");
    EXPECT(*(void **)(p->cpu + CPU_CLASS + CLASS_EXEC_INTERRUPT) == (void *)lib.exec_interrupt, "exec_interrupt");
    EXPECT(U64(uc, UC_CONTEXT_SIZE) == ENV_SIZE, "end_reset_fields");
    EXPECT(U8(uc, UC_INIT_DONE) == 1 && U8(uc, UC_NO_EXIT_REQUEST) == 0, "no_exit_request");
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        uint64_t mark = 0x1122334455667700ull + i;
        lib.reg_write(uc, words[i].reg, &mark);
        EXPECT(U64(p->env, words[i].offset) == mark, "registers");
    }
    static const struct {
        uint32_t index;
        int offset;
    } msrs[] = {{0xC0000081, ENV_STAR}, {0xC0000082, ENV_LSTAR}, {0xC0000084, ENV_FMASK}, {0xC0000103, ENV_TSC_AUX}};
    for (size_t i = 0; i < sizeof msrs / sizeof msrs[0]; i++) {
        U64(p->env, RCX * 8) = msrs[i].index;
        U64(p->env, RAX * 8) = 0x51020304u + (uint32_t)i;
        U64(p->env, RDX * 8) = 0x11;
        lib.old_wrmsr(p->env);
        EXPECT(U64(p->env, msrs[i].offset) == (0x1151020304ull + i), "MSRs");
    }
    uint32_t mxcsr = 0x1FA0;
    uint16_t fpuc = 0x27F;
    lib.reg_write(uc, REG_MXCSR, &mxcsr);
    lib.reg_write(uc, REG_FPCW, &fpuc);
    EXPECT(U32(p->env, ENV_MXCSR) == mxcsr && U16(p->env, ENV_FPUC) == fpuc, "FPU control");
    U32(p->env, ENV_MXCSR) = 0x1F80;
    U16(p->env, ENV_FPUC) = 0x37F;
    lib.update_mxcsr(p->env);
    lib.update_fp(p->env);
    EXPECT(U32(p->env, ENV_OLD_EXCEPTION) == 0xFFFFFFFFu, "old_exception");
    lib.emu_stop(uc);
    EXPECT(U8(uc, UC_STOP_REQUEST) == 1, "stop_request");
    return 0;
}

int engine_open(Partition *p, uint32_t code_buffer, char *message, size_t size)
{
    int error = lib.open(4, 8, &p->uc); /* UC_ARCH_X86, UC_MODE_64 */
    if (error) {
        snprintf(message, size, "the engine cannot be created: %s", lib.strerror(error));
        return -1;
    }
    lib.ctl(p->uc, CTL_WRITE(CTL_TCG_BUFFER_SIZE, 1), code_buffer);
    lib.ctl(p->uc, CTL_WRITE(CTL_USE_EXITS, 1), 1); /* no address ends emulation */
    uint64_t zero = 0;
    lib.reg_write(p->uc, REG_RAX, &zero); /* the engine finishes its set-up on first use */
    p->cpu = PTR(p->uc, UC_CPU);
    p->env = PTR(p->cpu, CPU_ENV_PTR);
    if (check_layout(p, message, size))
        return -1;
    U8(p->uc, UC_NO_EXIT_REQUEST) = 1;
    size_t hook;
    lib.hook_add(p->uc, &hook, UC_HOOK_INTR, (void *)on_exception, p, 1, 0);
    lib.hook_add(p->uc, &hook, UC_HOOK_INSN_INVALID, (void *)on_invalid_instruction, p, 1, 0);
    *(void **)(p->cpu + CPU_CLASS + CLASS_EXEC_INTERRUPT) = (void *)exec_interrupt;
    memcpy(p->fresh, p->env, ENV_SIZE);
    return 0;
}

void engine_close(Partition *p)
{
    if (p->uc)
        lib.close(p->uc);
    p->uc = NULL;
}

int engine_run(Partition *p)
{
    current = p;
    int error = setjmp(p->escape) ? 0 : lib.emu_start(p->uc, U64(p->env, ENV_RIP), 0, 0, 0);
    current = NULL;
    return error;
}

void engine_stop(Partition *p) { lib.emu_stop(p->uc); }

int engine_halted(const Partition *p) { return CONST_U32(p->cpu, CPU_HALTED) != 0; }

void engine_request(Partition *p, uint32_t bits)
{
    __atomic_fetch_or((uint32_t *)(p->cpu + CPU_INTERRUPT_REQUEST), bits, __ATOMIC_SEQ_CST);
}

void engine_unrequest(Partition *p, uint32_t bits)
{
    __atomic_fetch_and((uint32_t *)(p->cpu + CPU_INTERRUPT_REQUEST), ~bits, __ATOMIC_SEQ_CST);
}

void engine_poke(Partition *p)
{
    __atomic_store_n((int16_t *)(p->cpu + CPU_ICOUNT_DECR + 2), (int16_t)-1, __ATOMIC_SEQ_CST);
}

void engine_flush_tlb(Partition *p) { lib.tlb_flush(p->cpu); }

int engine_map(Partition *p, Region *r)
{
    int error = lib.mem_map_ptr(p->uc, r->gpa, r->size, r->perms, (void *)(uintptr_t)r->hva);
    if (error)
        return error;
    r->ram = lib.ram_from_host(p->uc, (void *)(uintptr_t)r->hva);
    if (!(r->perms & 2)) {
        lib.set_readonly(lib.find_mapping(p->uc, r->gpa), 1); /* the engine then drops stores ... */
        /* ... of which the hook tells; bounded to the region, as a wider one would slow every store down */
        lib.hook_add(p->uc, &r->hook, UC_HOOK_MEM_WRITE_PROT, (void *)on_write_protected, p, r->gpa,
                     r->gpa + r->size - 1);
    }
    return 0;
}

int engine_unmap(Partition *p, uint64_t gpa, uint64_t size, Region *r)
{
    if (r && r->hook)
        lib.hook_del(p->uc, r->hook);
    /* With a processor in sight the library flushes page by page, which for a hole of 2**52 bytes never ends. */
    PTR(p->uc, UC_CPU) = NULL;
    int error = lib.mem_unmap(p->uc, gpa, size);
    PTR(p->uc, UC_CPU) = p->cpu;
    lib.tlb_flush(p->cpu);
    return error;
}

int engine_map_hole(Partition *p, uint64_t gpa, uint64_t size)
{
    void *base = (void *)(uintptr_t)gpa;
    return lib.mmio_map(p->uc, gpa, size, (void *)on_mmio_read, base, (void *)on_mmio_write, base);
}

/* ---- processor state ---- */

void engine_cpuid(Partition *p, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    out[0] = out[1] = out[2] = out[3] = 0;
    for (int i = 0; i < p->cpuid_count; i++) {
        const CpuidEntry *e = &p->cpuid[i];
        if (e->leaf != leaf || (e->subleaf != subleaf && e->subleaf != 0xFFFFFFFFu))
            continue;
        out[0] = e->eax;
        out[1] = e->ebx;
        out[2] = e->ecx;
        out[3] = e->edx;
        break;
    }
    if (leaf == 1) {
        out[1] = (out[1] & 0x00FFFFFFu) | (uint32_t)p->loaded->index << 24;
        if (U64(p->env, ENV_CR + 32) & (1u << 18))
            out[2] |= 1u << 27; /* OSXSAVE mirrors CR4 */
    }
}

/* MSRs the library keeps itself. Everything else is partition.c's, or #GP as on hardware. */
static int engine_has_msr(uint32_t index, int write)
{
    switch (index) {
    case 0x174: case 0x175: case 0x176: /* SYSENTER */
    case 0x1A0:                         /* MISC_ENABLE */
    case 0x277: case 0x2FF:             /* PAT, MTRRdefType */
    case 0x250: case 0x258: case 0x259:
    case 0xC0000080: case 0xC0000081: case 0xC0000082: case 0xC0000083: case 0xC0000084:
    case 0xC0000100: case 0xC0000101: case 0xC0000102: case 0xC0000103:
        return 1;
    case 0xFE: case 0x179: case 0x198: /* MTRRcap, MCG_CAP, PERF_STATUS */
        return !write;
    case 0x17A: case 0x17B: /* MCG_STATUS, MCG_CTL */
        return 1;
    }
    return (index >= 0x200 && index <= 0x20F) || (index >= 0x268 && index <= 0x26F) || (index >= 0x400 && index < 0x428);
}

static int is_canonical(uint64_t address) { return (uint64_t)((int64_t)(address << 16) >> 16) == address; }

int engine_msr_read(Partition *p, uint32_t index, uint64_t *value)
{
    uint8_t *env = p->env;
    if (partition_msr_read(p, index, value))
        return 1;
    if (!engine_has_msr(index, 0))
        return 0;
    uint64_t rax = U64(env, RAX * 8), rcx = U64(env, RCX * 8), rdx = U64(env, RDX * 8);
    U64(env, RCX * 8) = index;
    lib.old_rdmsr(env);
    *value = (uint32_t)U64(env, RAX * 8) | U64(env, RDX * 8) << 32;
    U64(env, RAX * 8) = rax;
    U64(env, RCX * 8) = rcx;
    U64(env, RDX * 8) = rdx;
    return 1;
}

int engine_msr_write(Partition *p, uint32_t index, uint64_t value)
{
    uint8_t *env = p->env;
    if (partition_msr_write(p, index, value))
        return 1;
    if (!engine_has_msr(index, 1))
        return 0;
    switch (index) { /* [SDM] 2B WRMSR: non-canonical addresses and reserved bits are #GP */
    case 0x175: case 0x176: case 0xC0000082: case 0xC0000083:
    case 0xC0000100: case 0xC0000101: case 0xC0000102:
        if (!is_canonical(value))
            return 0;
        break;
    case 0xC0000080:
        if (value & ~0xD01ull)
            return 0;
        break;
    }
    uint64_t rax = U64(env, RAX * 8), rcx = U64(env, RCX * 8), rdx = U64(env, RDX * 8);
    U64(env, RCX * 8) = index;
    U64(env, RAX * 8) = (uint32_t)value;
    U64(env, RDX * 8) = value >> 32;
    lib.old_wrmsr(env);
    U64(env, RAX * 8) = rax;
    U64(env, RCX * 8) = rcx;
    U64(env, RDX * 8) = rdx;
    return 1;
}

int64_t engine_translate(Partition *p, uint64_t gva)
{
    uint32_t attributes[4] = {0};
    uint64_t page = lib.phys_page(p->cpu, gva & ~(MV_PAGE - 1), attributes);
    return page == ~0ull ? -1 : (int64_t)(page | (gva & (MV_PAGE - 1)));
}

/* The translation-time flags the library keeps beside the rest; it takes TF, IOPL and VM from EFLAGS each time. */
static void update_hflags(uint8_t *env)
{
    uint32_t old = U32(env, ENV_HFLAGS) & (HF_INHIBIT_IRQ);
    uint64_t cr0 = U64(env, ENV_CR), cr4 = U64(env, ENV_CR + 32), efer = U64(env, ENV_EFER), eflags = U64(env, ENV_EFLAGS);
    uint32_t cs = U32(env, ENV_SEGS + 24 * CS + 20), ss = U32(env, ENV_SEGS + 24 * SS + 20);
    uint32_t flags = old | ((ss >> 13) & HF_CPL);
    flags |= (cr0 & 1) << 7;                     /* PE */
    flags |= (uint32_t)(cr0 << 8) & 0xE00;       /* MP, EM, TS */
    if (cr4 & 0x200)
        flags |= HF_OSFXSR;
    if (cr4 & 0x200000)
        flags |= HF_SMAP;
    if (efer & 0x400)
        flags |= 0x4000; /* LMA */
    if ((flags & 0x4000) && (cs & 0x200000)) {
        flags |= 0x10 | 0x20 | HF_CS64;
    } else {
        flags |= (cs & 0x400000) ? 0x10 : 0;
        flags |= (ss & 0x400000) ? 0x20 : 0;
        int bases = U64(env, ENV_SEGS + 24 * DS + 8) || U64(env, ENV_SEGS + 24 * ES + 8) || U64(env, ENV_SEGS + 24 * SS + 8);
        if (!(cr0 & 1) || (eflags & FLAG_VM) || !(flags & 0x10) || bases)
            flags |= 0x40; /* ADDSEG */
    }
    U32(env, ENV_HFLAGS) = flags;
}

/* [SDM] 3A 10.1.1: state after power-up. `env` may be a saved context, `fresh` is the state of a new engine. */
void engine_reset_state(uint8_t *env, const uint8_t *fresh)
{
    memcpy(env, fresh, ENV_SIZE);
    memset(env, 0, ENV_HFLAGS);
    memset(env + ENV_CR, 0, 9 * 8);
    memset(env + ENV_STAR, 0, ENV_XCR0 - ENV_STAR);
    U64(env, ENV_EFER) = 0;
    U64(env, ENV_MISC_ENABLE) = 0; /* fast strings off: a third fewer instructions for page clearing in Linux */
    U64(env, ENV_RIP) = 0xFFF0;
    U32(env, ENV_A20) = -1;
    U64(env, ENV_CR) = 0x60000010;
    U32(env, ENV_HFLAGS2) = HF2_GIF;
    set_flags(env, 2);
    for (int i = 0; i < 6; i++)
        set_segment(env, i, 0, 0, 0xFFFF, 0x9300);
    set_segment(env, CS, 0xF000, 0xFFFF0000u, 0xFFFF, 0x9B00);
    U32(env, ENV_LDT + 16) = 0xFFFF;
    U32(env, ENV_LDT + 20) = 0x8200;
    U32(env, ENV_TR + 16) = 0xFFFF;
    U32(env, ENV_TR + 20) = 0x8B00;
    U32(env, ENV_GDT + 16) = 0xFFFF;
    U32(env, ENV_IDT + 16) = 0xFFFF;
    U64(env, RDX * 8) = 0x306C4;
    U16(env, ENV_FPUC) = 0x37F;
    memset(env + ENV_FPTAGS, 1, 8);
    U32(env, ENV_MXCSR) = 0x1F80;
    U64(env, ENV_XCR0) = 1;
    U64(env, ENV_PAT) = 0x0007040600070406ull;
    U64(env, ENV_DR + 6 * 8) = 0xFFFF0FF0;
    U64(env, ENV_DR + 7 * 8) = 0x400;
    U32(env, ENV_OLD_EXCEPTION) = -1;
    update_hflags(env);
}

void engine_sipi_state(uint8_t *env, const uint8_t *fresh, int vector)
{
    engine_reset_state(env, fresh);
    set_segment(env, CS, (uint32_t)vector << 8, (uint64_t)vector << 12, 0xFFFF, 0x9B00);
    U64(env, ENV_RIP) = 0;
    update_hflags(env);
}

/* Hardware breakpoints are objects of the engine: take them out before state leaves it ... */
static void drop_breakpoints(uint8_t *env)
{
    uint64_t dr7 = U64(env, ENV_DR + 56);
    if (!(dr7 & 0xFF))
        return;
    lib.update_dr7(env, 0x400);
    U64(env, ENV_DR + 56) = dr7;
}

/* ... and make them anew when it comes in. */
static void make_breakpoints(uint8_t *env)
{
    uint64_t dr7 = U64(env, ENV_DR + 56);
    memset(env + ENV_BREAKPOINTS, 0, 4 * 8);
    if (!(dr7 & 0xFF))
        return;
    U64(env, ENV_DR + 56) = 0x400;
    lib.update_dr7(env, (uint32_t)dr7);
}

/* A context from a file: what the engine uses without a look must be what it can be. The stack top indexes an array of
 * the host; SVM and SMM are not there; the modes of the floating point units follow from their control words. */
void engine_mend_context(uint8_t *env)
{
    U32(env, ENV_FPSTT) &= 7;
    U32(env, ENV_HFLAGS) &= ~(7u << 19); /* SMM, SVM enabled, SVM guest */
    U32(env, ENV_HFLAGS2) &= HF2_GIF | HF2_NMI;
    U64(env, ENV_EFER) &= 0xD01;
    U32(env, ENV_A20) = -1;
    U32(env, ENV_DF) = U32(env, ENV_DF) & 0x80000000u ? 0xFFFFFFFFu : 1;
    U32(env, ENV_MXCSR) &= 0xFFFF;
    lib.update_mxcsr(env);
    lib.update_fp(env);
}

/* Copy the engine's processor state out. The engine keeps running on its own copy. */
void engine_store(Partition *p, uint8_t *context)
{
    drop_breakpoints(p->env);
    memcpy(context, p->env, ENV_SIZE);
    memset(context + ENV_BREAKPOINTS, 0, 4 * 8);
    make_breakpoints(p->env);
}

/* Replace the engine's processor state. */
void engine_load_state(Partition *p, const uint8_t *context)
{
    int keep_tlb = engine_same_address_space(p->env, context);
    drop_breakpoints(p->env);
    memcpy(p->env, context, ENV_SIZE);
    make_breakpoints(p->env);
    if (!keep_tlb)
        lib.tlb_flush(p->cpu);
}

int engine_interrupts_enabled(const uint8_t *env) { return (CONST_U64(env, ENV_EFLAGS) & FLAG_IF) != 0; }

int engine_can_interrupt(const uint8_t *env)
{
    return engine_interrupts_enabled(env) && !(CONST_U32(env, ENV_HFLAGS) & HF_INHIBIT_IRQ);
}

/* Whether TLB entries made for `a` are good for `b`: same tables and same paging controls. */
int engine_same_address_space(const uint8_t *a, const uint8_t *b)
{
    const uint32_t write_protect_and_paging = 0x80010001u;
    return CONST_U64(a, ENV_CR + 24) == CONST_U64(b, ENV_CR + 24) && CONST_U64(a, ENV_CR + 32) == CONST_U64(b, ENV_CR + 32) &&
           !((CONST_U64(a, ENV_CR) ^ CONST_U64(b, ENV_CR)) & write_protect_and_paging) &&
           CONST_U64(a, ENV_EFER) == CONST_U64(b, ENV_EFER);
}

uint64_t engine_rip(const uint8_t *env) { return CONST_U64(env, ENV_RIP); }

/* ---- registers for Python: a flat array, order as in hypervisor/soft/registers.py ---- */

void mv_env_get(uint8_t *env, uint64_t *flat)
{
    memcpy(flat, env, 16 * 8);
    flat[16] = U64(env, ENV_RIP);
    flat[17] = flags_of(env);
    for (int i = 0; i < 8; i++) {
        uint8_t *segment = i < 6 ? env + ENV_SEGS + 24 * i : i == 6 ? env + ENV_LDT : env + ENV_TR;
        flat[18 + 3 * i] = U32(segment, 0);
        flat[19 + 3 * i] = U64(segment, 8);
        flat[20 + 3 * i] = (uint64_t)U32(segment, 16) << 32 | ((U32(segment, 20) >> 8) & 0xF0FF);
    }
    for (int i = 0; i < 2; i++) {
        uint8_t *table = env + (i ? ENV_IDT : ENV_GDT);
        flat[42 + 2 * i] = U64(table, 8);
        flat[43 + 2 * i] = U32(table, 16);
    }
    flat[46] = U64(env, ENV_CR);
    flat[47] = U64(env, ENV_CR + 16);
    flat[48] = U64(env, ENV_CR + 24);
    flat[49] = U64(env, ENV_CR + 32);
    flat[50] = 0; /* CR8 is the APIC's */
    flat[51] = U64(env, ENV_EFER);
}

void mv_env_set(uint8_t *env, const uint64_t *flat)
{
    memcpy(env, flat, 16 * 8);
    U64(env, ENV_RIP) = flat[16];
    set_flags(env, flat[17] | 2);
    /* On entry the engine takes the arithmetic and direction flags from here once more. */
    U64(env, ENV_EFLAGS) |= flat[17] & (CC_MASK | FLAG_DF);
    for (int i = 0; i < 8; i++) {
        uint8_t *segment = i < 6 ? env + ENV_SEGS + 24 * i : i == 6 ? env + ENV_LDT : env + ENV_TR;
        U32(segment, 0) = (uint32_t)flat[18 + 3 * i] & 0xFFFF;
        U64(segment, 8) = flat[19 + 3 * i];
        U32(segment, 16) = (uint32_t)(flat[20 + 3 * i] >> 32);
        U32(segment, 20) = (uint32_t)(flat[20 + 3 * i] & 0xF0FF) << 8;
    }
    for (int i = 0; i < 2; i++) {
        uint8_t *table = env + (i ? ENV_IDT : ENV_GDT);
        U64(table, 8) = flat[42 + 2 * i];
        U32(table, 16) = (uint32_t)flat[43 + 2 * i];
    }
    U64(env, ENV_CR) = flat[46];
    U64(env, ENV_CR + 16) = flat[47];
    U64(env, ENV_CR + 24) = flat[48];
    U64(env, ENV_CR + 32) = flat[49];
    U64(env, ENV_EFER) = flat[51];
    update_hflags(env);
}

void mv_env_debug(uint8_t *env, uint64_t *words, int set)
{
    for (int i = 0; i < 8; i++)
        if (set)
            U64(env, ENV_DR + 8 * i) = words[i];
        else
            words[i] = U64(env, ENV_DR + 8 * i);
}

/* The legacy region and header of a standard XSAVE area: 512 + 64 bytes. [SDM] 1 10.5.1, 13.4 */
void mv_env_get_xsave(uint8_t *env, uint8_t *area)
{
    memset(area, 0, 576);
    U16(area, 0) = U16(env, ENV_FPUC);
    uint32_t top = U32(env, ENV_FPSTT) & 7;
    U16(area, 2) = (uint16_t)((U16(env, ENV_FPUS) & ~0x3800) | top << 11);
    for (int i = 0; i < 8; i++)
        if (!U8(env, ENV_FPTAGS + i))
            area[4] |= (uint8_t)(1 << i);
    for (int i = 0; i < 8; i++) /* the area is in stack order, the engine keeps physical order */
        memcpy(area + 32 + 16 * i, env + ENV_FPREGS + 16 * ((i + top) & 7), 10);
    U32(area, 24) = U32(env, ENV_MXCSR);
    U32(area, 28) = 0xFFFF;
    for (int i = 0; i < 16; i++)
        memcpy(area + 160 + 16 * i, env + ENV_XMM + 64 * i, 16);
    U64(area, 512) = 3;
}

void mv_env_set_xsave(uint8_t *env, const uint8_t *area)
{
    uint16_t status = *(const uint16_t *)(area + 2);
    uint32_t top = (status >> 11) & 7;
    U16(env, ENV_FPUC) = *(const uint16_t *)area;
    U16(env, ENV_FPUS) = status & ~0x3800;
    U32(env, ENV_FPSTT) = top;
    for (int i = 0; i < 8; i++) {
        U8(env, ENV_FPTAGS + i) = !(area[4] & (1 << i));
        memcpy(env + ENV_FPREGS + 16 * ((i + top) & 7), area + 32 + 16 * i, 10);
    }
    U32(env, ENV_MXCSR) = CONST_U32(area, 24) & 0xFFFF;
    for (int i = 0; i < 16; i++)
        memcpy(env + ENV_XMM + 64 * i, area + 160 + 16 * i, 16);
    lib.update_mxcsr(env);
    lib.update_fp(env);
}

uint64_t *mv_env_xcr0(uint8_t *env) { return &U64(env, ENV_XCR0); }

/* What the engine would answer, before the machine model's policy. */
void mv_engine_cpuid(Partition *p, uint32_t leaf, uint32_t subleaf, uint32_t out[4])
{
    lib.cpuid(p->env, leaf, subleaf, &out[0], &out[1], &out[2], &out[3]);
}

uint32_t *engine_hidden_flags(uint8_t *env, int second) { return &U32(env, second ? ENV_HFLAGS2 : ENV_HFLAGS); }

void engine_set_fault_address(uint8_t *env, uint64_t gva) { U64(env, ENV_CR + 16) = gva; }

/* Of the access under way, ~0 where it is the processor's own. */
uint64_t engine_access_gva(void) { return slow.ra ? slow.gva : ~0ull; }
