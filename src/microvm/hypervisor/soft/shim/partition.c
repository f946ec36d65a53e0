/* SPDX-License-Identifier: GPL-2.0-only
 *
 * vCPUs, time and interrupts on one engine.
 *
 * Several engines on several threads are not coherent with each other, so all vCPUs of a partition share one engine and
 * take turns: a register file each, exchanged when a slice ends, when one halts, or when one spins (PAUSE). Each vCPU
 * still has its own thread in mv_vcpu_run(), because that is what the machine expects of any hypervisor; one of those
 * threads is the driver and executes whichever vCPU is due, the others sleep until there is something to return.
 *
 * Guest time is nanoseconds: host monotonic time plus an offset that pausing moves. The guest's TSC counts the same
 * nanoseconds (1 GHz in CPUID 0x15), so that a saved guest goes on under any host's clock.
 *
 * The ticker is a thread of ours that wakes the running vCPU for its APIC timer and the end of its slice. It sleeps
 * while nothing runs: an idle guest costs nothing, its driver sleeps until the next timer itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "soft.h"

#define SLICE_NS 2000000
#define LOOK_NS 10000000   /* a kick lost in the engine's store buffer is repeated after this at most */
#define REPEAT_NS 200000
#define GSI_PAGE 0xFEE00ull /* local APIC page number */

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_SEQ_CST)
#define TAKE(x, v) __atomic_exchange_n(&(x), (v), __ATOMIC_SEQ_CST)

/* ---- time ---- */

static int64_t host_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int64_t guest_now(const Partition *p) { return p->frozen ? p->frozen_at : host_now() + p->clock_offset; }

static struct timespec at_host(const Partition *p, int64_t guest)
{
    int64_t host = guest - p->clock_offset;
    struct timespec t = {host / 1000000000, host % 1000000000};
    if (host < 0)
        t.tv_sec = t.tv_nsec = 0;
    return t;
}

int64_t mv_time(Partition *p) { return guest_now(p); }

void mv_pause_time(Partition *p)
{
    if (!p->frozen) {
        p->frozen_at = guest_now(p);
        p->frozen = 1;
    }
}

void mv_resume_time(Partition *p)
{
    if (p->frozen) {
        p->clock_offset = p->frozen_at - host_now();
        p->frozen = 0;
    }
}

void mv_set_time(Partition *p, int64_t guest)
{
    p->frozen_at = guest;
    p->clock_offset = guest - host_now();
}

uint64_t partition_tsc(Partition *p, const Vcpu *v) { return (uint64_t)guest_now(p) + v->tsc_offset; }

/* ---- waking ---- */

/* Make the driver look at the partition, whatever it is doing. Any thread. */
static void poke(Partition *p)
{
    engine_request(p, REQUEST_KICK);
    engine_poke(p);
    if (LOAD(p->idle)) {
        pthread_mutex_lock(&p->lock);
        pthread_cond_signal(&p->idle_cond);
        pthread_mutex_unlock(&p->lock);
    }
}

static int64_t earliest(int64_t a, int64_t b) { return a < b ? a : b; }

static void ticker_look(Partition *p)
{
    int64_t due = earliest(p->next_due, p->slice_end);
    if (due == APIC_NEVER ? LOAD(p->ticker_wake) != APIC_NEVER : due >= LOAD(p->ticker_wake))
        return;
    pthread_mutex_lock(&p->ticker_lock);
    pthread_cond_signal(&p->ticker_cond);
    pthread_mutex_unlock(&p->ticker_lock);
}

static void *ticker_main(void *argument)
{
    Partition *p = argument;
    prctl(PR_SET_TIMERSLACK, 1);
    pthread_mutex_lock(&p->ticker_lock);
    while (!p->ticker_quit) {
        if (!LOAD(p->running)) {
            STORE(p->ticker_wake, APIC_NEVER);
            if (!LOAD(p->running)) {
                pthread_cond_wait(&p->ticker_cond, &p->ticker_lock);
                continue;
            }
        }
        int64_t now = guest_now(p), due = earliest(LOAD(p->next_due), LOAD(p->slice_end));
        if (due <= now) {
            engine_request(p, REQUEST_KICK);
            engine_poke(p);
            due = now + REPEAT_NS;
        } else {
            due = earliest(due, now + LOOK_NS);
        }
        STORE(p->ticker_wake, due);
        struct timespec until = at_host(p, due);
        if (pthread_cond_timedwait(&p->ticker_cond, &p->ticker_lock, &until) == ETIMEDOUT && LOAD(p->running))
            engine_poke(p); /* harmless where nothing is pending; repairs a kick lost on its way */
    }
    pthread_mutex_unlock(&p->ticker_lock);
    return NULL;
}

static void ticker_start(Partition *p)
{
    if (p->ticker_alive)
        return;
    p->ticker_quit = 0;
    p->ticker_wake = APIC_NEVER;
    p->ticker_alive = pthread_create(&p->ticker, NULL, ticker_main, p) == 0;
}

/* ---- memory map ---- */

Region *partition_region(Partition *p, uint64_t gpa, uint64_t size)
{
    for (int i = 0; i < p->region_count; i++) {
        Region *r = &p->regions[i];
        if (gpa >= r->gpa && gpa - r->gpa < r->size && size <= r->size - (gpa - r->gpa))
            return r;
    }
    return NULL;
}

static void unseal(Partition *p)
{
    for (int i = 0; i < p->hole_count; i++)
        engine_unmap(p, p->holes[i].gpa, p->holes[i].size, NULL);
    p->hole_count = 0;
    p->sealed = 0;
}

/* Cover every address without memory with MMIO: the engine reports unmapped accesses too late. */
static int seal(Partition *p)
{
    uint64_t at = 0, end = 1ull << 52;
    p->hole_count = 0;
    while (at < end) {
        Region *next = NULL;
        for (int i = 0; i < p->region_count; i++)
            if (p->regions[i].gpa >= at && (!next || p->regions[i].gpa < next->gpa))
                next = &p->regions[i];
        uint64_t stop = next ? next->gpa : end;
        if (stop > at) {
            if (engine_map_hole(p, at, stop - at))
                return -1;
            p->holes[p->hole_count].gpa = at;
            p->holes[p->hole_count++].size = stop - at;
        }
        at = next ? next->gpa + next->size : end;
    }
    p->sealed = 1;
    return 0;
}

static void free_bitmaps(Region *r)
{
    free(r->dirty);
    free(r->code);
    free(r->written);
}

/* Returns 0, -1 when full or overlapping, or the engine's error code. */
int mv_map(Partition *p, uint64_t gpa, uint64_t hva, uint64_t size, uint32_t perms, int track)
{
    if (p->region_count == MV_MAX_REGIONS || gpa + size > 1ull << 52)
        return -1;
    for (int i = 0; i < p->region_count; i++)
        if (gpa < p->regions[i].gpa + p->regions[i].size && p->regions[i].gpa < gpa + size)
            return -1;
    unseal(p);
    Region *r = &p->regions[p->region_count];
    memset(r, 0, sizeof *r);
    r->gpa = gpa;
    r->hva = hva;
    r->size = size;
    r->perms = perms;
    if (track) {
        r->dirty = calloc(1, size / MV_PAGE / 8 + 8);
        if (!r->dirty)
            return -1;
        p->tracking = 1;
    }
    r->code = calloc(1, size / MV_PAGE / 8 + 8);
    r->written = calloc(1, size / MV_PAGE / 8 + 8);
    r->written_low = UINT64_MAX;
    int error = r->code && r->written ? engine_map(p, r) : -1;
    if (error) {
        free_bitmaps(r);
        return error;
    }
    pthread_mutex_lock(&p->dma_lock);
    p->region_count++;
    pthread_mutex_unlock(&p->dma_lock);
    return 0;
}

int mv_unmap(Partition *p, uint64_t gpa, uint64_t size)
{
    for (int i = 0; i < p->region_count; i++) {
        Region *r = &p->regions[i];
        if (r->gpa != gpa || r->size != size)
            continue;
        unseal(p);
        tlb_forget_code(p, r, gpa, size);
        int error = engine_unmap(p, gpa, size, r);
        pthread_mutex_lock(&p->dma_lock);
        free_bitmaps(r);
        *r = p->regions[--p->region_count];
        pthread_mutex_unlock(&p->dma_lock);
        engine_flush_tlb(p);
        return error;
    }
    return -1;
}

/* Copy and clear a region's dirty bitmap. Not while a vCPU runs. */
int mv_dirty(Partition *p, uint64_t gpa, uint64_t size, uint8_t *bitmap)
{
    Region *r = partition_region(p, gpa, size);
    if (!r || !r->dirty || r->gpa != gpa || r->size != size)
        return -1;
    size_t bytes = (size / MV_PAGE + 7) / 8;
    memcpy(bitmap, r->dirty, bytes);
    memset(r->dirty, 0, bytes);
    engine_flush_tlb(p); /* the next write to each page goes the slow way again */
    return 0;
}

/* The host wrote guest memory: code translated from it must go before the guest runs on. Any thread. */
void mv_dma(Partition *p, uint64_t gpa, uint64_t size)
{
    pthread_mutex_lock(&p->dma_lock);
    for (int i = 0; i < p->region_count && size; i++) {
        Region *r = &p->regions[i];
        uint64_t from = gpa > r->gpa ? gpa : r->gpa;
        uint64_t to = gpa + size < r->gpa + r->size ? gpa + size : r->gpa + r->size;
        if (from < to)
            tlb_note_written(r, (from - r->gpa) / MV_PAGE, (to - 1 - r->gpa) / MV_PAGE);
    }
    STORE(p->dma_pending, 1);
    pthread_mutex_unlock(&p->dma_lock);
    /* Before the caller tells the guest: a guest that polls for completion meets the next block start first. */
    engine_request(p, REQUEST_KICK);
    engine_poke(p);
}

static void drain_dma(Partition *p)
{
    if (!LOAD(p->dma_pending))
        return;
    pthread_mutex_lock(&p->dma_lock);
    STORE(p->dma_pending, 0);
    for (int i = 0; i < p->region_count; i++)
        tlb_forget_written(p, &p->regions[i]);
    pthread_mutex_unlock(&p->dma_lock);
}

/* ---- interrupts ---- */

static void deliver(Partition *p, uint32_t destination, int logical, int mode, int vector, int level, int shorthand,
                    const Vcpu *from)
{
    for (int i = 0; i < p->vcpu_count; i++) {
        Vcpu *v = &p->vcpus[i];
        if (shorthand == 1 ? v != from : shorthand == 3 ? v == from : 0)
            continue;
        if (!shorthand && !apic_matches(&v->apic, destination, logical))
            continue;
        switch (mode) {
        case APIC_FIXED:
            apic_post(&v->apic, vector, level);
            break;
        case APIC_LOWEST: /* any one of the addressed processors: the first */
            apic_post(&v->apic, vector, level);
            return;
        case APIC_NMI:
            STORE(v->nmi_pending, 1);
            break;
        case APIC_INIT:
            STORE(v->init_pending, 1);
            break;
        case APIC_STARTUP:
            STORE(v->sipi_vector, vector);
            break;
        }
    }
}

void mv_signal_msi(Partition *p, uint64_t address, uint32_t data)
{
    deliver(p, (uint32_t)(address >> 12) & 0xFF, (int)(address >> 2) & 1, (int)(data >> 8) & 7, (int)(data & 0xFF),
            (int)(data >> 15) & 1, 0, NULL);
    poke(p);
}

static void send_ipi(Partition *p, Vcpu *v)
{
    uint32_t command = v->apic.icr_low;
    int mode = (int)(command >> 8) & 7;
    if (mode == APIC_INIT && !(command & 0x4000))
        return; /* INIT level de-assert: nothing to do since the Pentium 4 */
    deliver(p, v->apic.icr_high >> 24, (int)(command >> 11) & 1, mode, (int)(command & 0xFF), 0, (int)(command >> 18) & 3, v);
    engine_request(p, REQUEST_KICK);
    engine_poke(p);
}

void partition_rescan(Partition *p)
{
    if (apic_pending(&p->loaded->apic) >= 0) {
        engine_request(p, REQUEST_HARD);
        engine_poke(p);
    }
}

int partition_take_nmi(Partition *p) { return TAKE(p->loaded->nmi_pending, 0); }

int partition_take_vector(Partition *p)
{
    int vector = apic_pending(&p->loaded->apic);
    if (vector >= 0) {
        apic_accept(&p->loaded->apic, vector);
        p->counters.interrupts++;
    }
    return vector;
}

static void expire_timers(Partition *p, int64_t now)
{
    int64_t next = APIC_NEVER;
    for (int i = 0; i < p->vcpu_count; i++) {
        Apic *apic = &p->vcpus[i].apic;
        apic_expire(apic, now);
        next = earliest(next, apic->timer_due);
    }
    STORE(p->next_due, next);
}

void partition_timer_changed(Partition *p)
{
    int64_t next = APIC_NEVER;
    for (int i = 0; i < p->vcpu_count; i++)
        next = earliest(next, p->vcpus[i].apic.timer_due);
    STORE(p->next_due, next);
    ticker_look(p);
}

/* ---- scheduling ---- */

static const uint8_t *state_of(const Partition *p, const Vcpu *v) { return v == p->loaded ? p->env : v->context; }

uint8_t *partition_state(Partition *p, Vcpu *v) { return v == p->loaded ? p->env : v->context; }

static int is_runnable(const Partition *p, const Vcpu *v)
{
    if (!v->created || !LOAD(v->entered) || v->stop)
        return 0;
    if (v->run_state == RUN_RUNNABLE)
        return 1;
    if (v->run_state != RUN_HALTED)
        return 0;
    return LOAD(v->nmi_pending) || (engine_interrupts_enabled(state_of(p, v)) && apic_pending(&v->apic) >= 0);
}

static int others_runnable(const Partition *p)
{
    for (int i = 0; i < p->vcpu_count; i++)
        if (&p->vcpus[i] != p->loaded && is_runnable(p, &p->vcpus[i]))
            return 1;
    return 0;
}

static Vcpu *pick(Partition *p)
{
    for (int i = 1; i <= p->vcpu_count; i++) {
        Vcpu *v = &p->vcpus[(p->loaded->index + i) % p->vcpu_count];
        if (is_runnable(p, v))
            return v;
    }
    return NULL;
}

static int attention_wanted(const Partition *p)
{
    for (int i = 0; i < p->vcpu_count; i++) {
        const Vcpu *v = &p->vcpus[i];
        if ((LOAD(v->kicked) && LOAD(v->entered)) || LOAD(v->init_pending) || LOAD(v->sipi_vector) >= 0)
            return 1;
    }
    return LOAD(p->callback_failed);
}

/* On the running thread, at a block boundary, after a KICK. Never holds p->lock. */
void partition_service(Partition *p)
{
    p->counters.kicks++;
    drain_dma(p);
    int64_t now = guest_now(p);
    if (now >= p->next_due)
        expire_timers(p, now);
    int others = p->vcpu_count > 1 && others_runnable(p);
    if (p->loaded->stop || attention_wanted(p) || (others && (p->yield_wanted || now >= p->slice_end))) {
        engine_stop(p);
        return;
    }
    p->yield_wanted = 0;
    int64_t slice_end = !others ? APIC_NEVER : p->slice_end != APIC_NEVER ? p->slice_end : now + SLICE_NS;
    STORE(p->slice_end, slice_end);
    ticker_look(p);
    if (apic_pending(&p->loaded->apic) >= 0)
        engine_request(p, REQUEST_HARD);
}

void partition_pause_hint(Partition *p)
{
    if (p->vcpu_count > 1) {
        p->yield_wanted = 1;
        engine_request(p, REQUEST_KICK);
    }
}

/* The loaded vCPU cannot go on. The caller stops the engine. */
void partition_crash(Partition *p, int stop, const char *detail)
{
    Vcpu *v = p->loaded;
    if (v->stop)
        return;
    snprintf(v->detail, sizeof v->detail, "%s", detail);
    v->stop = stop;
}

static void load(Partition *p, Vcpu *v)
{
    if (v == p->loaded)
        return;
    p->counters.switches++;
    engine_store(p, p->loaded->context);
    engine_load_state(p, v->context);
    p->loaded = v;
}

/* INIT and SIPI messages that have arrived. [SDM] 3A 9.4 */
static void take_signals(Partition *p)
{
    for (int i = 0; i < p->vcpu_count; i++) {
        Vcpu *v = &p->vcpus[i];
        if (TAKE(v->init_pending, 0)) {
            if (v == p->loaded) {
                engine_reset_state(p->env, p->fresh);
                engine_flush_tlb(p);
            }
            engine_reset_state(v->context, p->fresh);
            apic_init_signal(&v->apic);
            v->run_state = i == 0 ? RUN_RUNNABLE : RUN_WAIT_SIPI;
            v->nmi_pending = 0;
        }
        int vector = TAKE(v->sipi_vector, -1);
        if (vector >= 0 && v->run_state == RUN_WAIT_SIPI) {
            if (v == p->loaded) {
                engine_sipi_state(p->env, p->fresh, vector);
                engine_flush_tlb(p);
            } else {
                engine_sipi_state(v->context, p->fresh, vector);
            }
            v->run_state = RUN_RUNNABLE;
        }
    }
}

/* Whether nothing inside the partition can wake any vCPU again. */
static int is_dead(const Partition *p)
{
    for (int i = 0; i < p->vcpu_count; i++) {
        const Vcpu *v = &p->vcpus[i];
        if (!v->created)
            continue;
        if (!LOAD(v->entered) || v->stop)
            return 0;
        if (v->run_state == RUN_HALTED && engine_interrupts_enabled(state_of(p, v)))
            return 0;
    }
    return 1;
}

static void take_kicks(Partition *p)
{
    int any = 0;
    for (int i = 0; i < p->vcpu_count; i++) {
        Vcpu *v = &p->vcpus[i];
        if (v->entered && !v->stop && p->broken)
            v->stop = STOP_ABORT;
        else if (v->entered && !v->stop && LOAD(p->callback_failed))
            v->stop = STOP_CALLBACK;
        else if (v->entered && !v->stop && TAKE(v->kicked, 0))
            v->stop = STOP_KICKED;
        any |= v->stop;
    }
    if (any)
        pthread_cond_broadcast(&p->role_cond);
}

static void sleep_until_event(Partition *p)
{
    STORE(p->idle, 1);
    if (!attention_wanted(p) && !pick(p)) {
        if (p->next_due == APIC_NEVER) {
            pthread_cond_wait(&p->idle_cond, &p->lock);
        } else {
            struct timespec until = at_host(p, p->next_due);
            pthread_cond_timedwait(&p->idle_cond, &p->lock, &until);
        }
    }
    STORE(p->idle, 0);
}

/* Run guest code of the loaded vCPU until the engine stops. Takes and leaves with p->lock held. */
static void execute(Partition *p)
{
    Vcpu *v = p->loaded;
    v->run_state = RUN_RUNNABLE;
    p->yield_wanted = 0;
    STORE(p->slice_end, others_runnable(p) ? guest_now(p) + SLICE_NS : APIC_NEVER);
    engine_request(p, REQUEST_KICK); /* look at timers, DMA and vectors before the first block */
    STORE(p->running, 1);
    ticker_look(p);
    pthread_mutex_unlock(&p->lock);
    int error = engine_run(p);
    pthread_mutex_lock(&p->lock);
    STORE(p->running, 0);
    if (v->stop == STOP_EXIT && engine_halted(p)) /* HLT right behind the end of an interrupt that is to be told */
        v->run_state = RUN_HALTED;
    if (!v->stop && error) {
        char text[120];
        snprintf(text, sizeof text, "the software CPU cannot go on at %#llx (engine error %d)",
                 (unsigned long long)engine_rip(p->env), error);
        partition_crash(p, STOP_ENGINE, text);
    } else if (!v->stop && engine_halted(p)) {
        p->counters.hlt++;
        v->run_state = RUN_HALTED;
    }
    if (v->stop)
        mv_env_get(p->env, v->registers);
}

/* Until `self` has something to return. With p->lock held. */
static void drive(Partition *p, const Vcpu *self)
{
    while (1) {
        take_kicks(p);
        if (self->stop)
            return;
        take_signals(p);
        drain_dma(p);
        expire_timers(p, guest_now(p));
        Vcpu *v = pick(p);
        if (v) {
            load(p, v);
            execute(p);
        } else if (is_dead(p)) {
            for (int i = 0; i < p->vcpu_count; i++)
                if (p->vcpus[i].created)
                    p->vcpus[i].stop = STOP_HALTED;
            pthread_cond_broadcast(&p->role_cond);
        } else {
            sleep_until_event(p);
        }
    }
}

/* Returns STOP_*. The detail of a crash is in mv_vcpu_detail(). */
int mv_vcpu_run(Partition *p, int index)
{
    Vcpu *v = &p->vcpus[index];
    prctl(PR_SET_TIMERSLACK, 1); /* sleeping to the guest's next timer must not add the host's 50 us */
    pthread_mutex_lock(&p->lock);
    if (!p->sealed && seal(p)) {
        pthread_mutex_unlock(&p->lock);
        snprintf(v->detail, sizeof v->detail, "the engine refused the memory map");
        return STOP_ENGINE;
    }
    ticker_start(p);
    if (p->exits && exit_pending(v)) {
        pthread_mutex_unlock(&p->lock);
        return STOP_EXIT;
    }
    STORE(v->entered, 1);
    engine_request(p, REQUEST_KICK); /* the driver may now have one more vCPU to run, asleep or running another */
    engine_poke(p);
    pthread_cond_signal(&p->idle_cond);
    while (!v->stop) {
        if (p->driving) {
            pthread_cond_wait(&p->role_cond, &p->lock);
            continue;
        }
        p->driving = 1;
        drive(p, v);
        p->driving = 0;
        pthread_cond_broadcast(&p->role_cond);
    }
    int stop = v->stop;
    v->stop = STOP_NONE;
    STORE(v->entered, 0);
    if (p->closing)
        pthread_cond_broadcast(&p->role_cond);
    pthread_mutex_unlock(&p->lock);
    return stop;
}

const char *mv_vcpu_detail(Partition *p, int index) { return p->vcpus[index].detail; }

/* The registers of a vCPU that has crashed, while others may run. */
const uint64_t *mv_vcpu_crashed(Partition *p, int index) { return p->vcpus[index].registers; }

void mv_vcpu_kick(Partition *p, int index)
{
    STORE(p->vcpus[index].kicked, 1);
    poke(p);
}

/* A callback raised: stop everything and let Python raise it from run(). */
void mv_callback_failed(Partition *p, int failed)
{
    STORE(p->callback_failed, failed);
    if (failed)
        poke(p);
}

/* ---- I/O from the engine ---- */

int partition_callback_failed(const Partition *p) { return LOAD(p->callback_failed); }

/* The handler raised: its access was made, but the instruction is to run again and must not make it twice. */
static void keep_unretired(Partition *p, int kind, uint32_t port, uint32_t size, uint64_t value)
{
    p->unretired.kind = kind;
    p->unretired.vcpu = p->loaded->index;
    p->unretired.port = port;
    p->unretired.size = size;
    p->unretired.value = value;
}

static int was_done(Partition *p, int kind, uint32_t port, uint32_t size)
{
    if (p->unretired.kind != kind || p->unretired.vcpu != p->loaded->index || p->unretired.port != port ||
        p->unretired.size != size)
        return 0;
    p->unretired.kind = 0;
    return 1;
}

uint64_t partition_pio_read(Partition *p, uint32_t port, uint32_t size)
{
    if (size == 1)
        for (int i = 0; i < MV_MAX_LATCHES; i++)
            if (LOAD(p->latches[i].port) == port) {
                p->counters.latched++;
                return LOAD(p->latches[i].value);
            }
    if (was_done(p, UNRETIRED_READ, port, size))
        return p->unretired.value;
    p->counters.pio++;
    uint64_t value = p->callbacks.pio_read(port, size);
    if (LOAD(p->callback_failed))
        keep_unretired(p, UNRETIRED_READ, port, size, value);
    return value;
}

void partition_pio_write(Partition *p, uint32_t port, uint32_t size, uint32_t value)
{
    if (was_done(p, UNRETIRED_WRITE, port, size))
        return;
    p->counters.pio++;
    p->callbacks.pio_write(port, size, value);
    if (LOAD(p->callback_failed))
        keep_unretired(p, UNRETIRED_WRITE, port, size, value);
}

/* Answer one-byte reads of a port; a negative value takes the answer back. Returns whether there was room. */
int mv_latch_pio(Partition *p, uint32_t port, int value)
{
    int free_slot = -1;
    for (int i = 0; i < MV_MAX_LATCHES; i++) {
        uint32_t held = LOAD(p->latches[i].port);
        if (held == port) {
            if (value < 0)
                STORE(p->latches[i].port, 0x10000u);
            else
                STORE(p->latches[i].value, (uint32_t)value);
            return 1;
        }
        if (held == 0x10000u)
            free_slot = i;
    }
    if (value < 0)
        return 1;
    if (free_slot < 0)
        return 0;
    STORE(p->latches[free_slot].value, (uint32_t)value);
    STORE(p->latches[free_slot].port, port);
    return 1;
}

static void apic_access(Partition *p, uint32_t offset, uint32_t value)
{
    Vcpu *v = p->loaded;
    int vector = 0;
    switch (apic_write(&v->apic, offset, value, guest_now(p), &vector)) {
    case APIC_RESCAN:
        partition_rescan(p);
        break;
    case APIC_SEND_IPI:
        send_ipi(p, v);
        break;
    case APIC_TIMER_CHANGED:
        partition_timer_changed(p);
        break;
    case APIC_EOI_BROADCAST:
        if (p->exits)
            exit_end_of_interrupt(p, vector);
        else
            p->callbacks.eoi((uint32_t)vector);
        partition_rescan(p);
        break;
    }
}

uint64_t partition_mmio_read(Partition *p, uint64_t gpa, uint32_t size)
{
    if (gpa >> 12 == GSI_PAGE) {
        uint32_t value = apic_read(&p->loaded->apic, (uint32_t)gpa & 0xFFC, guest_now(p));
        return value >> (8 * (gpa & 3));
    }
    p->counters.mmio++;
    return p->callbacks.mmio_read(gpa, size);
}

void partition_mmio_write(Partition *p, uint64_t gpa, uint32_t size, uint64_t value)
{
    if (gpa >> 12 == GSI_PAGE) {
        if (size == 4)
            apic_access(p, (uint32_t)gpa & 0xFFF, (uint32_t)value);
        return;
    }
    for (int i = 0; i < p->doorbell_count; i++) {
        const Doorbell *bell = &p->doorbells[i];
        if (bell->gpa == gpa && bell->size == size && bell->value == value) {
            uint64_t one = 1;
            p->counters.doorbells++;
            if (write(bell->fd, &one, sizeof one) == sizeof one || errno == EAGAIN)
                return;
            break; /* the event is gone: let the bus have it */
        }
    }
    p->counters.mmio++;
    p->callbacks.mmio_write(gpa, size, value);
}

/* Not while a vCPU runs. Returns whether there was room. */
int mv_doorbell(Partition *p, uint64_t gpa, uint32_t size, uint64_t value, int fd)
{
    for (int i = 0; i < p->doorbell_count; i++)
        if (p->doorbells[i].gpa == gpa && p->doorbells[i].size == size && p->doorbells[i].value == value) {
            p->doorbells[i].fd = fd;
            return 1;
        }
    if (p->doorbell_count == MV_MAX_DOORBELLS)
        return 0;
    p->doorbells[p->doorbell_count++] = (Doorbell){gpa, value, size, fd};
    return 1;
}

/* ---- MSRs that are not the engine's ---- */

static uint8_t *guest_bytes(Partition *p, uint64_t gpa, uint64_t size)
{
    Region *r = partition_region(p, gpa, size);
    if (!r || !(r->perms & 2))
        return NULL;
    if (r->dirty)
        for (uint64_t page = (gpa - r->gpa) / MV_PAGE; page <= (gpa + size - 1 - r->gpa) / MV_PAGE; page++)
            __atomic_fetch_or(&r->dirty[page >> 3], (uint8_t)(1u << (page & 7)), __ATOMIC_RELAXED);
    return (uint8_t *)(uintptr_t)(r->hva + gpa - r->gpa);
}

/* The paravirtual clock: system time = TSC, both in nanoseconds. [Linux Documentation/virt/kvm/x86/msr.rst] */
static void write_kvm_clock(Partition *p, Vcpu *v)
{
    struct __attribute__((packed)) {
        uint32_t version, pad;
        uint64_t tsc, system;
        uint32_t mul;
        int8_t shift;
        uint8_t flags, pad2[2];
    } info = {2, 0, partition_tsc(p, v), (uint64_t)guest_now(p), 0x80000000u, 1, 1, {0, 0}};
    uint8_t *to = guest_bytes(p, v->kvm_clock & ~1ull, sizeof info);
    if (to)
        memcpy(to, &info, sizeof info);
}

static void write_kvm_wall(Partition *p, Vcpu *v)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    int64_t boot = t.tv_sec * 1000000000ll + t.tv_nsec - guest_now(p);
    uint32_t words[3] = {2, (uint32_t)(boot / 1000000000), (uint32_t)(boot % 1000000000)};
    uint8_t *to = guest_bytes(p, v->kvm_wall, sizeof words);
    if (to)
        memcpy(to, words, sizeof words);
}

int partition_msr_read(Partition *p, uint32_t index, uint64_t *value)
{
    Vcpu *v = p->loaded;
    switch (index) {
    case 0x10: *value = partition_tsc(p, v); return 1;
    case 0x1B: *value = v->apic.base; return 1;
    case 0x6E0: *value = v->apic.tsc_deadline; return 1;
    case 0x4B564D00: *value = v->kvm_wall; return 1;
    case 0x4B564D01: *value = v->kvm_clock; return 1;
    case 0x3A: *value = 1; return 1; /* FEATURE_CONTROL: locked, nothing enabled */
    /* Read by Linux without a guard, or by every Intel kernel at boot: platform id, microcode, SMI count, platform info,
     * misc features, debug control. */
    case 0x17: case 0x34: case 0x8B: case 0xCE: case 0x140: case 0x1D9: *value = 0; return 1;
    }
    return 0;
}

int partition_msr_write(Partition *p, uint32_t index, uint64_t value)
{
    Vcpu *v = p->loaded;
    switch (index) {
    case 0x10:
        v->tsc_offset = value - (uint64_t)guest_now(p);
        if (v->kvm_clock & 1)
            write_kvm_clock(p, v);
        return 1;
    case 0x1B: /* the APIC stays where it is and on, in xAPIC mode */
        return (value & ~0x900ull) == (v->apic.base & ~0x900ull) && (value & 0x800);
    case 0x6E0:
        apic_set_deadline(&v->apic, value, partition_tsc(p, v), guest_now(p));
        partition_timer_changed(p);
        return 1;
    case 0x4B564D00:
        if (value & 3)
            return 0;
        v->kvm_wall = value;
        write_kvm_wall(p, v);
        return 1;
    case 0x4B564D01:
        if (value & 2)
            return 0;
        v->kvm_clock = value;
        if (value & 1)
            write_kvm_clock(p, v);
        return 1;
    case 0x8B: case 0x79: case 0x140: case 0x1D9: return 1; /* accepted without effect */
    }
    return 0;
}

/* ---- life, and state for Python (never while a vCPU runs) ---- */

int mv_load_library(const char *path, char *message, size_t size) { return engine_load(path, message, size); }

static void ticker_stop(Partition *p)
{
    if (!p->ticker_alive)
        return;
    pthread_mutex_lock(&p->ticker_lock);
    p->ticker_quit = 1;
    pthread_cond_signal(&p->ticker_cond);
    pthread_mutex_unlock(&p->ticker_lock);
    pthread_join(p->ticker, NULL);
    p->ticker_alive = 0;
}

static void make_locks(Partition *p)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_mutex_init(&p->ticker_lock, NULL);
    pthread_mutex_init(&p->dma_lock, NULL);
    pthread_cond_init(&p->idle_cond, &monotonic);
    pthread_cond_init(&p->role_cond, NULL);
    pthread_cond_init(&p->ticker_cond, &monotonic);
    pthread_condattr_destroy(&monotonic);
}

Partition *mv_partition_new(int vcpus, uint32_t code_buffer, const Callbacks *callbacks, char *message, size_t size)
{
    Partition *p;
    if (vcpus < 1 || vcpus > MV_MAX_VCPUS || posix_memalign((void **)&p, 64, sizeof *p)) {
        snprintf(message, size, "out of memory");
        return NULL;
    }
    memset(p, 0, sizeof *p);
    p->vcpu_count = vcpus;
    p->callbacks = *callbacks;
    if (engine_open(p, code_buffer, message, size)) {
        engine_close(p);
        free(p);
        return NULL;
    }
    make_locks(p);
    p->clock_offset = -host_now();
    p->slice_end = p->next_due = APIC_NEVER;
    for (int i = 0; i < MV_MAX_LATCHES; i++)
        p->latches[i].port = 0x10000u;
    for (int i = 0; i < vcpus; i++) {
        Vcpu *v = &p->vcpus[i];
        v->partition = p;
        v->index = i;
        v->sipi_vector = -1;
        v->exception = -1;
        v->run_state = i ? RUN_WAIT_SIPI : RUN_RUNNABLE;
        apic_reset(&v->apic, (uint32_t)i, i == 0);
        engine_reset_state(v->context, p->fresh);
    }
    p->loaded = &p->vcpus[0];
    engine_reset_state(p->env, p->fresh);
    engine_flush_tlb(p);
    return p;
}

/* Idempotent on the Python side. vCPUs should not be running; those that are, are stopped first. */
void mv_partition_free(Partition *p)
{
    pthread_mutex_lock(&p->lock);
    p->closing = 1;
    for (int i = 0; i < p->vcpu_count; i++) {
        while (LOAD(p->vcpus[i].entered)) {
            STORE(p->vcpus[i].kicked, 1);
            engine_request(p, REQUEST_KICK);
            engine_poke(p);
            pthread_cond_signal(&p->idle_cond);
            pthread_cond_wait(&p->role_cond, &p->lock);
        }
    }
    pthread_mutex_unlock(&p->lock);
    ticker_stop(p);
    engine_close(p);
    for (int i = 0; i < p->region_count; i++)
        free_bitmaps(&p->regions[i]);
    free(p);
}

/* The ticker would not come along; while no vCPU runs it has nothing to do. The next mv_vcpu_run() makes a new one. */
void mv_before_fork(Partition *p)
{
    pthread_mutex_lock(&p->lock);
    int running = 0;
    for (int i = 0; i < p->vcpu_count; i++)
        running |= LOAD(p->vcpus[i].entered);
    pthread_mutex_unlock(&p->lock);
    if (!running)
        ticker_stop(p);
}

/* After fork, in the child: none of our threads came along, whatever they were doing. The child may run the partition if
 * no vCPU ran, or close it. */
void mv_after_fork(Partition *p)
{
    p->ticker_alive = 0;
    p->ticker_wake = APIC_NEVER;
    p->driving = p->running = p->idle = 0;
    for (int i = 0; i < p->vcpu_count; i++)
        p->vcpus[i].entered = p->vcpus[i].stop = 0;
    make_locks(p);
}

void mv_set_cpuid(Partition *p, const CpuidEntry *entries, int count)
{
    p->cpuid_count = count < MV_MAX_CPUID ? count : MV_MAX_CPUID;
    memcpy(p->cpuid, entries, sizeof *entries * (size_t)p->cpuid_count);
}

void mv_vcpu_create(Partition *p, int index) { p->vcpus[index].created = 1; }

/* The processor state of a vCPU as the mv_env_* functions take it; the vCPU is loaded into the engine first. */
uint8_t *mv_vcpu_env(Partition *p, int index)
{
    load(p, &p->vcpus[index]);
    return p->env;
}

/* New registers end a HLT. A vCPU that waits for its SIPI keeps waiting. */
void mv_vcpu_registers_set(Partition *p, int index)
{
    engine_flush_tlb(p);
    if (p->unretired.vcpu == index)
        p->unretired.kind = UNRETIRED_NONE;
    if (p->vcpus[index].run_state == RUN_HALTED)
        p->vcpus[index].run_state = RUN_RUNNABLE;
}

int mv_vcpu_msr(Partition *p, int index, uint32_t msr, uint64_t *value, int set)
{
    load(p, &p->vcpus[index]);
    return set ? engine_msr_write(p, msr, *value) : engine_msr_read(p, msr, value);
}

int64_t mv_vcpu_translate(Partition *p, int index, uint64_t gva)
{
    load(p, &p->vcpus[index]);
    return engine_translate(p, gva);
}

uint32_t mv_vcpu_tpr(Partition *p, int index, int set, uint32_t value)
{
    if (set)
        p->vcpus[index].apic.tpr = value;
    return p->vcpus[index].apic.tpr;
}

typedef struct Saved {
    uint32_t run_state, nmi_pending;
    int32_t init_pending, sipi_vector;
    uint64_t tsc_offset, kvm_clock, kvm_wall;
    Apic apic;
    uint8_t context[ENV_SIZE];
} Saved;

uint32_t mv_vcpu_state_size(void) { return (uint32_t)sizeof(Saved); }

void mv_vcpu_save(Partition *p, int index, Saved *out)
{
    Vcpu *v = &p->vcpus[index];
    memset(out, 0, sizeof *out);
    out->run_state = (uint32_t)v->run_state;
    out->nmi_pending = (uint32_t)v->nmi_pending;
    out->init_pending = v->init_pending;
    out->sipi_vector = v->sipi_vector;
    out->tsc_offset = v->tsc_offset;
    out->kvm_clock = v->kvm_clock;
    out->kvm_wall = v->kvm_wall;
    out->apic = v->apic;
    if (v == p->loaded)
        engine_store(p, out->context);
    else
        memcpy(out->context, v->context, ENV_SIZE);
}

void mv_vcpu_restore(Partition *p, int index, const Saved *in)
{
    Vcpu *v = &p->vcpus[index];
    v->run_state = in->run_state <= RUN_HALTED ? (int)in->run_state : RUN_RUNNABLE;
    v->nmi_pending = in->nmi_pending != 0;
    v->init_pending = in->init_pending != 0;
    v->sipi_vector = in->sipi_vector >= 0 && in->sipi_vector < 256 ? in->sipi_vector : -1;
    v->tsc_offset = in->tsc_offset;
    v->kvm_clock = in->kvm_clock;
    v->kvm_wall = in->kvm_wall;
    v->apic = in->apic;
    v->apic.id = (uint32_t)index;
    memcpy(v->context, in->context, ENV_SIZE);
    engine_mend_context(v->context);
    if (v == p->loaded) {
        engine_load_state(p, v->context);
        engine_flush_tlb(p);
    }
    partition_timer_changed(p);
}

const Counters *mv_counters(Partition *p) { return &p->counters; }
