/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The engine's TLB: which stores it lets pass unseen, how it grows, and how page tables are read.
 *
 * A TLB entry whose write address carries NOTDIRTY sends stores the slow way, where translations of the page are thrown
 * away. The library decides by virtual address which entries need that, so an alias of a page stays writable behind its
 * back; and it makes every new entry NOTDIRTY, so that the first store to each page after each flush is slow. Here a bit
 * for each page of RAM (`Region.code`) says that translated code may be on it. The rule is: while the bit is set, no
 * entry for the page is writable without NOTDIRTY. The bit is set, and all entries for the host page marked, before a
 * translation becomes visible; it is cleared when the page's translations have gone. Pages without the bit are entered
 * writable at once.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>

#include "soft.h"

#define CPU_TLB 35344 /* env_tlb: three {mask, table} pairs just before the counter */
#define NOTDIRTY 0x400u
#define MODES 3
#define GROWN_BY_US (1u << 14) /* entries up to which thrashing makes a TLB grow: 64 MiB of pages in 1 MiB of host memory */

typedef struct Entry {
    uint64_t read, write, code, paddr, addend, pad[3];
} Entry;

typedef struct Table {
    uint64_t mask; /* (entries - 1) * sizeof(Entry) */
    Entry *entries;
} Table;

static struct {
    uint64_t (*page_addr_code)(uint8_t *env, uint64_t gva);
    void (*reset_dirty)(uint8_t *cpu, uint64_t hva, uint64_t size);
    void (*forget)(uint8_t *uc, uint64_t start, uint64_t end);
    void (*reset_dirty_by_vaddr)(uint8_t *, uint64_t, uint64_t);
    void (*protect_code)(uint8_t *, uint64_t);
    void (*set_dirty)(uint8_t *, uint64_t);
    void (*invalidate_fast)(uint8_t *, void *, uint64_t, int, uintptr_t);
    void (*set_page)(uint8_t *, uint64_t, uint64_t, uint32_t, int, int, uint64_t);
    void (*flush)(uint8_t *, uint16_t);
    uint64_t (*ldq_phys)(uint8_t *, uint64_t);
    void (*stl_phys)(uint8_t *, uint64_t, uint32_t);
} old;

int tlb_load(void *handle, const char **missing)
{
    const struct {
        void *slot;
        const char *name;
    } symbols[] = {
        {&old.page_addr_code, "get_page_addr_code_x86_64"},
        {&old.reset_dirty, "tlb_reset_dirty_x86_64"},
        {&old.forget, "tb_invalidate_phys_range_x86_64"},
        {&old.reset_dirty_by_vaddr, "tlb_reset_dirty_by_vaddr_x86_64"},
        {&old.protect_code, "tlb_protect_code_x86_64"},
        {&old.set_dirty, "tlb_set_dirty_x86_64"},
        {&old.invalidate_fast, "tb_invalidate_phys_page_fast_x86_64"},
        {&old.set_page, "tlb_set_page_with_attrs_x86_64"},
        {&old.flush, "tlb_flush_by_mmuidx_x86_64"},
        {&old.ldq_phys, "x86_ldq_phys_x86_64"},
        {&old.stl_phys, "x86_stl_phys_notdirty_x86_64"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *found = dlsym(handle, symbols[i].name);
        if (!found) {
            *missing = symbols[i].name;
            return -1;
        }
        memcpy(symbols[i].slot, &found, sizeof found);
    }
    return 0;
}

void tlb_flush_by_mmuidx_x86_64(uint8_t *cpu, uint16_t modes);

static Entry *entry_of(uint8_t *cpu, int mode, uint64_t gva)
{
    Table *table = (Table *)(cpu + CPU_TLB) + mode;
    return &table->entries[(gva >> 12) & (table->mask / sizeof(Entry))];
}

static int has_code(const Region *r, uint64_t gpa)
{
    uint64_t page = (gpa - r->gpa) / MV_PAGE;
    return r->code[page >> 3] >> (page & 7) & 1;
}

static void mark_dirty(Region *r, uint64_t gpa)
{
    if (r->dirty) {
        uint64_t page = (gpa - r->gpa) / MV_PAGE;
        __atomic_fetch_or(&r->dirty[page >> 3], (uint8_t)(1u << (page & 7)), __ATOMIC_RELAXED);
    }
}

static void forget_page(Partition *p, Region *r, uint64_t page)
{
    old.forget(p->uc, r->ram + page * MV_PAGE, r->ram + page * MV_PAGE + MV_PAGE);
    r->code[page >> 3] &= (uint8_t)~(1u << (page & 7));
}

/* Throw away what was translated from these pages of the region. On the driver's thread. */
void tlb_forget_code(Partition *p, Region *r, uint64_t gpa, uint64_t size)
{
    uint64_t page = (gpa - r->gpa) / MV_PAGE, end = (gpa - r->gpa + size + MV_PAGE - 1) / MV_PAGE;
    while (page < end) {
        uint8_t eight = r->code[page >> 3];
        if (!eight)
            page = (page | 7) + 1;
        else if (eight >> (page & 7) & 1)
            forget_page(p, r, page++);
        else
            page++;
    }
}

/* The host wrote these pages, both ends included. Any thread, with dma_lock. */
void tlb_note_written(Region *r, uint64_t first, uint64_t last)
{
    for (uint64_t page = first; page <= last; page++)
        r->written[page >> 3] |= (uint8_t)(1u << (page & 7));
    r->written_low = first < r->written_low ? first : r->written_low;
    r->written_high = last > r->written_high ? last : r->written_high;
}

/* Throw away what was translated from pages that the host wrote. On the driver's thread, with dma_lock. */
void tlb_forget_written(Partition *p, Region *r)
{
    if (r->written_low > r->written_high)
        return;
    for (uint64_t byte = r->written_low >> 3; byte <= r->written_high >> 3; byte++) {
        uint32_t stale = r->written[byte] & r->code[byte];
        r->written[byte] = 0;
        for (; stale; stale &= stale - 1)
            forget_page(p, r, byte * 8 + (uint64_t)__builtin_ctz(stale));
    }
    r->written_low = UINT64_MAX;
    r->written_high = 0;
}

/* ---- code comes onto a page ---- */

static void guard(Partition *p, uint64_t ram)
{
    for (int i = 0; i < p->region_count; i++) {
        Region *r = &p->regions[i];
        if (ram - r->ram >= r->size)
            continue;
        uint64_t page = (ram - r->ram) / MV_PAGE;
        if (r->code[page >> 3] >> (page & 7) & 1)
            return;
        r->code[page >> 3] |= (uint8_t)(1u << (page & 7));
        old.reset_dirty(p->cpu, r->hva + page * MV_PAGE, MV_PAGE);
        return;
    }
}

__attribute__((visibility("default"))) void tlb_reset_dirty_by_vaddr_x86_64(uint8_t *cpu, uint64_t gva, uint64_t size)
{
    Partition *p = current;
    if (!p || p->cpu != cpu) {
        old.reset_dirty_by_vaddr(cpu, gva, size);
        return;
    }
    gva &= ~(MV_PAGE - 1);
    for (uint64_t page = 0; page < (size > MV_PAGE ? 2 : 1); page++)
        guard(p, old.page_addr_code(p->env, gva + page * MV_PAGE));
}

/* The first translation on a page, while it is being linked. */
__attribute__((visibility("default"))) void tlb_protect_code_x86_64(uint8_t *uc, uint64_t ram)
{
    Partition *p = current;
    if (p && p->uc == uc)
        guard(p, ram);
    else
        old.protect_code(uc, ram);
}

/* ---- stores ---- */

/* First store through an entry: the page's translations go, and only then may stores pass unseen. */
__attribute__((visibility("default"))) void tlb_set_dirty_x86_64(uint8_t *cpu, uint64_t gva)
{
    Partition *p = current;
    if (!p || p->cpu != cpu) {
        old.set_dirty(cpu, gva);
        return;
    }
    gva &= ~(MV_PAGE - 1);
    for (int mode = 0; mode < MODES; mode++) {
        Entry *e = entry_of(cpu, mode, gva);
        if (e->write != (gva | NOTDIRTY))
            continue;
        uint64_t gpa = e->paddr & ~(MV_PAGE - 1);
        Region *r = partition_region(p, gpa, MV_PAGE);
        if (r) {
            if (has_code(r, gpa))
                forget_page(p, r, (gpa - r->gpa) / MV_PAGE);
            mark_dirty(r, gpa);
        }
        e->write = gva;
    }
}

/* Called for every store to a page that is not known to be free of code: the only sight of stores to executable pages. */
__attribute__((visibility("default"))) void tb_invalidate_phys_page_fast_x86_64(uint8_t *uc, void *pages, uint64_t ram,
                                                                                  int size, uintptr_t ra)
{
    Partition *p = current;
    if (p && p->uc == uc && p->tracking)
        for (int i = 0; i < p->region_count; i++) {
            Region *r = &p->regions[i];
            if (r->dirty && ram - r->ram < r->size)
                mark_dirty(r, r->gpa + (ram - r->ram));
        }
    old.invalidate_fast(uc, pages, ram, size, ra);
}

/* ---- entries ---- */

/* The library doubles a TLB that is nearly full, but only when the guest flushes it; one program that walks through
 * memory never does. Here a TLB that was filled several times over since its last flush is flushed. */
static void relieve(Partition *p, int mode)
{
    Table *table = (Table *)(p->cpu + CPU_TLB) + mode;
    uint64_t entries = table->mask / sizeof(Entry) + 1;
    if (++p->fills[mode] > 4 * entries && entries < GROWN_BY_US)
        tlb_flush_by_mmuidx_x86_64(p->cpu, (uint16_t)(1u << mode));
}

__attribute__((visibility("default"))) void tlb_set_page_with_attrs_x86_64(uint8_t *cpu, uint64_t gva, uint64_t gpa,
                                                                             uint32_t attributes, int perms, int mode,
                                                                             uint64_t size)
{
    Partition *p = current;
    if (!p || p->cpu != cpu) {
        old.set_page(cpu, gva, gpa, attributes, perms, mode, size);
        return;
    }
    relieve(p, mode);
    old.set_page(cpu, gva, gpa, attributes, perms, mode, size);
    gva &= ~(MV_PAGE - 1);
    gpa &= ~(MV_PAGE - 1);
    Entry *e = entry_of(cpu, mode, gva);
    if (e->write == (gva | NOTDIRTY)) {
        Region *r = partition_region(p, gpa, MV_PAGE);
        if (r && !r->dirty && (r->perms & 2) && !has_code(r, gpa))
            e->write = gva;
    }
}

__attribute__((visibility("default"))) void tlb_flush_by_mmuidx_x86_64(uint8_t *cpu, uint16_t modes)
{
    Partition *p = current;
    if (p && p->cpu == cpu)
        for (int mode = 0; mode < MODES; mode++)
            if (modes >> mode & 1)
                p->fills[mode] = 0;
    old.flush(cpu, modes);
}

/* ---- page tables ---- */

/* Four reads for each entry made: straight from memory instead of through the library's memory map. */
__attribute__((visibility("default"))) uint64_t x86_ldq_phys_x86_64(uint8_t *cpu, uint64_t gpa)
{
    Partition *p = current;
    if (p && p->cpu == cpu && !(gpa & 7)) {
        const Region *r = partition_region(p, gpa, 8);
        if (r)
            return __atomic_load_n((const uint64_t *)(uintptr_t)(r->hva + gpa - r->gpa), __ATOMIC_RELAXED);
    }
    return old.ldq_phys(cpu, gpa);
}

/* Accessed and dirty bits. */
__attribute__((visibility("default"))) void x86_stl_phys_notdirty_x86_64(uint8_t *cpu, uint64_t gpa, uint32_t value)
{
    Partition *p = current;
    if (p && p->cpu == cpu && !(gpa & 3)) {
        Region *r = partition_region(p, gpa, 4);
        if (r && (r->perms & 2)) {
            mark_dirty(r, gpa);
            __atomic_store_n((uint32_t *)(uintptr_t)(r->hva + gpa - r->gpa), value, __ATOMIC_RELAXED);
            return;
        }
    }
    old.stl_phys(cpu, gpa, value);
}
