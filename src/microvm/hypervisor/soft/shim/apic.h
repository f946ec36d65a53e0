/* SPDX-License-Identifier: Apache-2.0
 *
 * Local APIC of one virtual CPU, xAPIC mode. [SDM] volume 3A, chapter 11.
 *
 * The register file is owned by the thread that runs the vCPU; other threads may only call apic_post(), which
 * touches nothing but the atomic request and trigger-mode bits.
 */
#ifndef MICROVM_APIC_H
#define MICROVM_APIC_H

#include <stdint.h>

#define APIC_NEVER INT64_MAX
#define APIC_TIMER_HZ 25000000 /* CPUID leaf 0x15 ECX says the same: Linux takes the rate from there */
#define APIC_TICK_NS (1000000000 / APIC_TIMER_HZ)

enum { LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVT_COUNT };

enum { APIC_FIXED = 0, APIC_LOWEST = 1, APIC_SMI = 2, APIC_NMI = 4, APIC_INIT = 5, APIC_STARTUP = 6, APIC_EXTINT = 7 };

typedef struct Apic {
    uint32_t irr[8]; /* atomic */
    uint32_t tmr[8]; /* atomic */
    uint32_t isr[8];
    uint32_t id, tpr, ldr, dfr, svr, esr, esr_latched, icr_low, icr_high;
    uint32_t lvt[LVT_COUNT];
    uint32_t timer_initial, timer_divide;
    uint64_t base;         /* IA32_APIC_BASE */
    uint64_t tsc_deadline; /* IA32_TSC_DEADLINE, in guest TSC ticks; 0 when not armed */
    int64_t timer_start;   /* guest time of the last write to the initial count */
    int64_t timer_due;     /* guest time of the next expiry, APIC_NEVER if none */
} Apic;

/* What a register access asks of the outside. */
enum { APIC_NOTHING, APIC_RESCAN, APIC_SEND_IPI, APIC_TIMER_CHANGED, APIC_EOI_BROADCAST };

void apic_reset(Apic *apic, uint32_t id, int is_bsp);
/* INIT keeps the APIC id and base. */
void apic_init_signal(Apic *apic);
uint32_t apic_read(Apic *apic, uint32_t offset, int64_t now);
/* Returns one of the above. For APIC_EOI_BROADCAST *vector is the level-triggered vector that ended. */
int apic_write(Apic *apic, uint32_t offset, uint32_t value, int64_t now, int *vector);
/* Set a request bit. Any thread. Vectors below 16 are dropped. Returns whether it was taken. */
int apic_post(Apic *apic, int vector, int level);
/* Highest vector that may be delivered now, or -1. */
int apic_pending(const Apic *apic);
/* Move a pending vector from requested to in service. */
void apic_accept(Apic *apic, int vector);
/* Write IA32_TSC_DEADLINE: tsc is the guest TSC now. */
void apic_set_deadline(Apic *apic, uint64_t deadline, uint64_t tsc, int64_t now);
/* Fire the timer if due. Returns whether it fired. */
int apic_expire(Apic *apic, int64_t now);
/* Whether a message for this destination is for this APIC. [SDM] 3A 11.6.2 */
int apic_matches(const Apic *apic, uint32_t destination, int logical);

#endif
