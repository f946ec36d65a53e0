/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Exits: a partition that hands accesses out instead of calling back, as a hypervisor does.
 *
 * With `exits` on, a vCPU stops *before* a port, device or unknown-MSR access, with the processor's state at the start
 * of the instruction; whoever runs it carries the instruction out and sets the registers behind it. The ends of
 * level-triggered interrupts are told after the fact. State of a vCPU that does not run can then be read and written
 * while others run: by all functions here, which take the lock. testing.SimulatedWhp is made of this.
 */
#include <string.h>

#include "soft.h"

#define HF_INHIBIT_IRQ 8u
#define HF2_NMI 4u
#define FLAT_TPR 50

void mv_env_get(uint8_t *env, uint64_t *flat);
void mv_env_set(uint8_t *env, const uint64_t *flat);

void mv_set_exits(Partition *p, int on) { p->exits = on; }

/* Called instead of an access. Returns whether the instruction is to be abandoned. */
int exit_before(Partition *p, int kind, uint64_t address, uint32_t size, uint64_t value)
{
    if (!p->exits)
        return 0;
    if ((kind == EXIT_MMIO_READ || kind == EXIT_MMIO_WRITE) && address >> 12 == 0xFEE00)
        return 0; /* the local APIC is inside */
    Vcpu *v = p->loaded;
    if (!v->stop) { /* else: an end of interrupt is to be told first, and the instruction runs again */
        int mmio = kind == EXIT_MMIO_READ || kind == EXIT_MMIO_WRITE;
        v->exit = (Exit){(uint32_t)kind, size, address, value, mmio ? engine_access_gva() : ~0ull};
        v->stop = STOP_EXIT;
    }
    engine_request(p, REQUEST_KICK);
    engine_poke(p);
    return 1;
}

void exit_end_of_interrupt(Partition *p, int vector)
{
    Vcpu *v = p->loaded;
    v->ended[vector >> 5] |= 1u << (vector & 31);
    if (!v->stop) {
        v->exit.kind = EXIT_NONE;
        v->stop = STOP_EXIT;
    }
    engine_request(p, REQUEST_KICK);
    engine_poke(p);
}

/* Whether ends of interrupts are to be told before the vCPU runs on. */
int exit_pending(const Vcpu *v)
{
    for (int i = 0; i < 8; i++)
        if (v->ended[i])
            return 1;
    return 0;
}

int exit_take_exception(Partition *p, int *vector, uint32_t *code)
{
    Vcpu *v = p->loaded;
    if (v->exception < 0)
        return 0;
    *vector = v->exception;
    *code = v->exception_code;
    if (v->exception == 14)
        engine_set_fault_address(p->env, v->exception_address);
    v->exception = -1;
    return 1;
}

/* What the vCPU stopped for; ends of interrupts first, one a call. */
void mv_vcpu_exit(Partition *p, int index, Exit *out)
{
    Vcpu *v = &p->vcpus[index];
    *out = v->exit;
    for (int i = 0; i < 8; i++)
        if (v->ended[i]) {
            int bit = __builtin_ctz(v->ended[i]);
            v->ended[i] &= v->ended[i] - 1;
            *out = (Exit){EXIT_EOI, 0, (uint64_t)(i * 32 + bit), 0, ~0ull};
            return;
        }
    v->exit.kind = EXIT_NONE;
}

/* The registers of mv_env_get, of a vCPU that is not inside mv_vcpu_run; others may be. */
void mv_vcpu_get(Partition *p, int index, uint64_t *flat)
{
    Vcpu *v = &p->vcpus[index];
    pthread_mutex_lock(&p->lock);
    mv_env_get(partition_state(p, v), flat);
    flat[FLAT_TPR] = v->apic.tpr >> 4;
    pthread_mutex_unlock(&p->lock);
}

void mv_vcpu_set(Partition *p, int index, const uint64_t *flat)
{
    static const int paging[] = {46, 48, 49, 51}; /* CR0, CR3, CR4, EFER */
    Vcpu *v = &p->vcpus[index];
    uint64_t old[FLAT_WORDS];
    pthread_mutex_lock(&p->lock);
    uint8_t *env = partition_state(p, v);
    mv_env_get(env, old);
    mv_env_set(env, flat);
    v->apic.tpr = (uint32_t)(flat[FLAT_TPR] & 0xF) << 4;
    for (int i = 0; i < 4 && v == p->loaded; i++)
        if (old[paging[i]] != flat[paging[i]]) {
            engine_flush_tlb(p);
            break;
        }
    pthread_mutex_unlock(&p->lock);
}

/* run state (RUN_*), interrupt shadow, NMI masked, NMI pending, exception + 1, its code, its address */
void mv_vcpu_activity(Partition *p, int index, uint64_t words[7], int set)
{
    Vcpu *v = &p->vcpus[index];
    pthread_mutex_lock(&p->lock);
    uint8_t *env = partition_state(p, v);
    uint32_t *flags = engine_hidden_flags(env, 0), *flags2 = engine_hidden_flags(env, 1);
    if (set) {
        v->run_state = (int)words[0];
        *flags = words[1] ? *flags | HF_INHIBIT_IRQ : *flags & ~HF_INHIBIT_IRQ;
        *flags2 = words[2] ? *flags2 | HF2_NMI : *flags2 & ~HF2_NMI;
        v->nmi_pending = words[3] != 0;
        v->exception = (int)words[4] - 1;
        v->exception_code = (uint32_t)words[5];
        v->exception_address = words[6];
    } else {
        words[0] = (uint64_t)v->run_state;
        words[1] = (*flags & HF_INHIBIT_IRQ) != 0;
        words[2] = (*flags2 & HF2_NMI) != 0;
        words[3] = (uint64_t)v->nmi_pending;
        words[4] = (uint64_t)(v->exception + 1);
        words[5] = v->exception_code;
        words[6] = v->exception_address;
    }
    pthread_mutex_unlock(&p->lock);
}

static const uint16_t lvt_offset[LVT_COUNT] = {0x320, 0x330, 0x340, 0x350, 0x360, 0x370};

/* The local APIC as its 4096-byte register page, a register in each 16 bytes. */
void mv_vcpu_apic(Partition *p, int index, uint32_t *page, int set)
{
    Apic *a = &p->vcpus[index].apic;
    int64_t now = mv_time(p);
    pthread_mutex_lock(&p->lock);
    if (!set) {
        memset(page, 0, MV_PAGE);
        for (uint32_t offset = 0; offset < 0x400; offset += 16)
            page[offset / 4] = apic_read(a, offset, now);
    } else {
        int vector;
        for (int i = 0; i < 8; i++) {
            a->isr[i] = page[(0x100 + 16 * i) / 4];
            a->tmr[i] = page[(0x180 + 16 * i) / 4];
            a->irr[i] = page[(0x200 + 16 * i) / 4];
        }
        a->tpr = page[0x80 / 4] & 0xFF;
        a->ldr = page[0xD0 / 4];
        a->dfr = page[0xE0 / 4];
        a->svr = page[0xF0 / 4] & 0x3FF;
        a->esr = page[0x280 / 4];
        a->icr_low = page[0x300 / 4];
        a->icr_high = page[0x310 / 4];
        for (int i = 0; i < LVT_COUNT; i++)
            a->lvt[i] = page[lvt_offset[i] / 4];
        a->timer_divide = page[0x3E0 / 4] & 0xB;
        a->timer_due = APIC_NEVER;
        a->tsc_deadline = 0;
        a->timer_initial = 0;
        apic_write(a, 0x380, page[0x390 / 4], now, &vector); /* what was left ... */
        a->timer_initial = page[0x380 / 4];                   /* ... of this */
    }
    pthread_mutex_unlock(&p->lock);
    if (set)
        partition_timer_changed(p);
}

/* For several calls that are to see one state: no vCPU starts or stops meanwhile. */
void mv_lock(Partition *p) { pthread_mutex_lock(&p->lock); }

void mv_unlock(Partition *p) { pthread_mutex_unlock(&p->lock); }

/* With the lock held. Returns NULL while the vCPU runs. */
uint8_t *mv_vcpu_state(Partition *p, int index)
{
    Vcpu *v = &p->vcpus[index];
    return v == p->loaded && p->running ? NULL : partition_state(p, v);
}
