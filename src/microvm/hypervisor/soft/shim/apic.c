/* SPDX-License-Identifier: Apache-2.0 */
#include "apic.h"

#include <string.h>

#define LVT_MASKED 0x10000u
#define SVR_ENABLED 0x100u
#define TIMER_PERIODIC 1u
#define TIMER_DEADLINE 2u
#define VERSION 0x00050014u /* integrated APIC, six LVT entries */

static const uint16_t lvt_offset[LVT_COUNT] = {0x320, 0x330, 0x340, 0x350, 0x360, 0x370};

static int highest(const uint32_t *bits)
{
    for (int word = 7; word >= 0; word--) {
        uint32_t value = __atomic_load_n(&bits[word], __ATOMIC_SEQ_CST);
        if (value)
            return word * 32 + 31 - __builtin_clz(value);
    }
    return -1;
}

static uint32_t timer_mode(const Apic *apic) { return (apic->lvt[LVT_TIMER] >> 17) & 3; }

static int64_t tick_ns(const Apic *apic)
{
    uint32_t code = (apic->timer_divide & 3) | ((apic->timer_divide >> 1) & 4);
    return (int64_t)APIC_TICK_NS << ((code + 1) & 7);
}

static void defaults(Apic *apic)
{
    uint32_t id = apic->id;
    uint64_t base = apic->base;
    memset(apic, 0, sizeof *apic);
    apic->id = id;
    apic->base = base;
    apic->dfr = 0xFFFFFFFFu;
    apic->svr = 0xFF;
    for (int i = 0; i < LVT_COUNT; i++)
        apic->lvt[i] = LVT_MASKED;
    apic->timer_due = APIC_NEVER;
}

void apic_reset(Apic *apic, uint32_t id, int is_bsp)
{
    apic->id = id;
    apic->base = 0xFEE00800ull | (is_bsp ? 0x100 : 0);
    defaults(apic);
}

void apic_init_signal(Apic *apic) { defaults(apic); }

static uint32_t current_count(const Apic *apic, int64_t now)
{
    if (timer_mode(apic) == TIMER_DEADLINE || !apic->timer_initial || apic->timer_due == APIC_NEVER)
        return 0;
    int64_t left = (apic->timer_due - now) / tick_ns(apic);
    return left < 0 ? 0 : (uint32_t)left;
}

uint32_t apic_read(Apic *apic, uint32_t offset, int64_t now)
{
    if (offset & 0xF)
        return 0; /* registers are the first four bytes of each 16 */
    switch (offset) {
    case 0x20: return apic->id << 24;
    case 0x30: return VERSION;
    case 0x80: return apic->tpr;
    case 0xA0: { /* processor priority */
        int isr = highest(apic->isr);
        uint32_t service = isr < 0 ? 0 : (uint32_t)isr & 0xF0;
        return (apic->tpr & 0xF0) >= service ? apic->tpr : service;
    }
    case 0xD0: return apic->ldr;
    case 0xE0: return apic->dfr;
    case 0xF0: return apic->svr;
    case 0x280: return apic->esr;
    case 0x300: return apic->icr_low;
    case 0x310: return apic->icr_high;
    case 0x380: return apic->timer_initial;
    case 0x390: return current_count(apic, now);
    case 0x3E0: return apic->timer_divide;
    }
    for (int i = 0; i < LVT_COUNT; i++)
        if (offset == lvt_offset[i])
            return apic->lvt[i];
    if (offset >= 0x100 && offset < 0x280) {
        const uint32_t *bank = offset < 0x180 ? apic->isr : offset < 0x200 ? apic->tmr : apic->irr;
        return __atomic_load_n(&bank[(offset >> 4) & 7], __ATOMIC_SEQ_CST);
    }
    return 0;
}

static void start_timer(Apic *apic, int64_t now)
{
    apic->timer_start = now;
    if (timer_mode(apic) == TIMER_DEADLINE)
        return;
    apic->timer_due = apic->timer_initial ? now + (int64_t)apic->timer_initial * tick_ns(apic) : APIC_NEVER;
}

static int end_of_interrupt(Apic *apic, int *vector)
{
    int ended = highest(apic->isr);
    if (ended < 0)
        return APIC_NOTHING;
    apic->isr[ended >> 5] &= ~(1u << (ended & 31));
    if (__atomic_load_n(&apic->tmr[ended >> 5], __ATOMIC_SEQ_CST) & (1u << (ended & 31))) {
        *vector = ended;
        return APIC_EOI_BROADCAST;
    }
    return APIC_RESCAN;
}

static int write_lvt(Apic *apic, int entry, uint32_t value)
{
    static const uint32_t writable[LVT_COUNT] = {0x700FF, 0x107FF, 0x107FF, 0x1A7FF, 0x1A7FF, 0x100FF};
    uint32_t old_mode = timer_mode(apic);
    value &= writable[entry];
    if (!(apic->svr & SVR_ENABLED))
        value |= LVT_MASKED;
    apic->lvt[entry] = value;
    if (entry != LVT_TIMER || old_mode == timer_mode(apic))
        return APIC_NOTHING;
    if (old_mode == TIMER_DEADLINE || timer_mode(apic) == TIMER_DEADLINE) { /* [SDM] 3A 11.5.4: disarms */
        apic->timer_due = APIC_NEVER;
        apic->tsc_deadline = 0;
        apic->timer_initial = 0;
        return APIC_TIMER_CHANGED;
    }
    return APIC_NOTHING;
}

int apic_write(Apic *apic, uint32_t offset, uint32_t value, int64_t now, int *vector)
{
    if (offset & 0xF)
        return APIC_NOTHING;
    switch (offset) {
    case 0x20: return APIC_NOTHING; /* the id is fixed here: it is what MADT says */
    case 0x80: apic->tpr = value & 0xFF; return APIC_RESCAN;
    case 0xB0: return end_of_interrupt(apic, vector);
    case 0xD0: apic->ldr = value & 0xFF000000u; return APIC_NOTHING;
    case 0xE0: apic->dfr = value | 0x0FFFFFFFu; return APIC_NOTHING;
    case 0xF0:
        apic->svr = value & 0x3FF;
        if (!(value & SVR_ENABLED))
            for (int i = 0; i < LVT_COUNT; i++)
                apic->lvt[i] |= LVT_MASKED;
        return APIC_RESCAN;
    case 0x280: apic->esr = apic->esr_latched; apic->esr_latched = 0; return APIC_NOTHING;
    case 0x300: apic->icr_low = value & 0x000CCFFFu & ~0x1000u; return APIC_SEND_IPI;
    case 0x310: apic->icr_high = value & 0xFF000000u; return APIC_NOTHING;
    case 0x380:
        if (timer_mode(apic) == TIMER_DEADLINE)
            return APIC_NOTHING;
        apic->timer_initial = value;
        start_timer(apic, now);
        return APIC_TIMER_CHANGED;
    case 0x3E0: {
        uint32_t left = current_count(apic, now);
        apic->timer_divide = value & 0xB;
        if (left)
            apic->timer_due = now + (int64_t)left * tick_ns(apic);
        return APIC_TIMER_CHANGED;
    }
    }
    for (int i = 0; i < LVT_COUNT; i++)
        if (offset == lvt_offset[i])
            return write_lvt(apic, i, value);
    return APIC_NOTHING;
}

int apic_post(Apic *apic, int vector, int level)
{
    uint32_t bit = 1u << (vector & 31);
    int word = vector >> 5;
    if (vector < 16 || vector > 255)
        return 0;
    if (level)
        __atomic_fetch_or(&apic->tmr[word], bit, __ATOMIC_SEQ_CST);
    else
        __atomic_fetch_and(&apic->tmr[word], ~bit, __ATOMIC_SEQ_CST);
    __atomic_fetch_or(&apic->irr[word], bit, __ATOMIC_SEQ_CST);
    return 1;
}

int apic_pending(const Apic *apic)
{
    if (!(apic->svr & SVR_ENABLED))
        return -1;
    int vector = highest(apic->irr);
    if (vector < 0)
        return -1;
    int serving = highest(apic->isr);
    int floor = (int)(apic->tpr & 0xF0);
    if (serving >= 0 && (serving & 0xF0) > floor)
        floor = serving & 0xF0;
    return (vector & 0xF0) > floor ? vector : -1;
}

void apic_accept(Apic *apic, int vector)
{
    __atomic_fetch_and(&apic->irr[vector >> 5], ~(1u << (vector & 31)), __ATOMIC_SEQ_CST);
    apic->isr[vector >> 5] |= 1u << (vector & 31);
}

void apic_set_deadline(Apic *apic, uint64_t deadline, uint64_t tsc, int64_t now)
{
    if (timer_mode(apic) != TIMER_DEADLINE)
        return; /* [SDM] 3A 11.5.4.1: writes are ignored in the other modes */
    apic->tsc_deadline = deadline;
    if (!deadline)
        apic->timer_due = APIC_NEVER;
    else if (deadline <= tsc)
        apic->timer_due = now;
    else /* the guest TSC counts nanoseconds; cap what a hostile value can do to the sum */
        apic->timer_due = now + (int64_t)(deadline - tsc < (1ull << 60) ? deadline - tsc : 1ull << 60);
}

int apic_expire(Apic *apic, int64_t now)
{
    if (apic->timer_due > now)
        return 0;
    uint32_t lvt = apic->lvt[LVT_TIMER];
    if (timer_mode(apic) == TIMER_PERIODIC && apic->timer_initial) {
        int64_t period = (int64_t)apic->timer_initial * tick_ns(apic);
        /* Lost periods are dropped, and none is shorter than 20 us: a guest may not turn the host into its timer. */
        if (period < 20000)
            period = 20000;
        apic->timer_due += period;
        if (apic->timer_due <= now)
            apic->timer_due = now + period;
    } else {
        apic->timer_due = APIC_NEVER;
        apic->tsc_deadline = 0;
    }
    if (lvt & LVT_MASKED)
        return 0;
    return apic_post(apic, (int)(lvt & 0xFF), 0);
}

int apic_matches(const Apic *apic, uint32_t destination, int logical)
{
    if (destination == 0xFF)
        return 1;
    if (!logical)
        return apic->id == destination;
    uint32_t own = apic->ldr >> 24;
    if ((apic->dfr >> 28) == 0xF)
        return (own & destination) != 0;
    return (own >> 4) == (destination >> 4) && (own & destination & 0xF) != 0; /* cluster model */
}
