/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The software CPU's shim: what Python calls (mv_*), and what its two halves share. engine.c knows the insides of the
 * unicorn library (QEMU's TCG), partition.c makes vCPUs, time and interrupts out of it.
 */
#ifndef MICROVM_SOFT_H
#define MICROVM_SOFT_H

#include <pthread.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>

#include "apic.h"

#define MV_MAX_VCPUS 32
#define MV_MAX_REGIONS 32
#define MV_MAX_DOORBELLS 256
#define MV_MAX_LATCHES 8
#define MV_MAX_CPUID 128
#define MV_PAGE 4096ull

#define ENV_SIZE 5568 /* env up to end_reset_fields: all state of one processor */

#define FLAT_WORDS (16 + 2 + 8 * 3 + 2 * 2 + 6) /* registers as mv_env_get and mv_env_set take them */

/* Set in cpu->interrupt_request. HARD: a vector waits for IF. KICK: partition.c has something to look at. */
#define REQUEST_HARD 0x2u
#define REQUEST_KICK 0x40000u

/* Stop reasons, as hypervisor/soft/vcpu.py knows them. */
enum { STOP_NONE, STOP_KICKED, STOP_HALTED, STOP_TRIPLE_FAULT, STOP_ENGINE, STOP_ABORT, STOP_CALLBACK, STOP_EXIT };

/* What a vCPU stopped before, where a partition hands accesses out instead of calling back (exits.c). */
enum { EXIT_NONE, EXIT_MMIO_READ, EXIT_MMIO_WRITE, EXIT_PIO_READ, EXIT_PIO_WRITE, EXIT_MSR_READ, EXIT_MSR_WRITE, EXIT_EOI };

enum { UNRETIRED_NONE, UNRETIRED_READ, UNRETIRED_WRITE };

enum { RUN_WAIT_SIPI, RUN_RUNNABLE, RUN_HALTED };

typedef uint64_t (*mv_pio_read)(uint32_t port, uint32_t size);
typedef void (*mv_pio_write)(uint32_t port, uint32_t size, uint32_t value);
typedef uint64_t (*mv_mmio_read)(uint64_t gpa, uint32_t size);
typedef void (*mv_mmio_write)(uint64_t gpa, uint32_t size, uint64_t value);
typedef void (*mv_eoi)(uint32_t vector);

typedef struct Callbacks {
    mv_pio_read pio_read;
    mv_pio_write pio_write;
    mv_mmio_read mmio_read;
    mv_mmio_write mmio_write;
    mv_eoi eoi;
} Callbacks;

typedef struct Region {
    uint64_t gpa, size, hva, ram; /* ram: the engine's own address for the block (ram_addr_t) */
    uint32_t perms;
    uint8_t *dirty; /* one bit a page, or NULL when not tracked */
    uint8_t *written; /* one bit a page: the host wrote it and translations may be stale; under dma_lock */
    uint64_t written_low, written_high; /* pages between which bits of `written` are set */
    uint8_t *code;  /* one bit a page: it may hold translated code, so no TLB entry writes to it unseen */
    size_t hook;
} Region;

typedef struct Doorbell {
    uint64_t gpa, value;
    uint32_t size;
    int fd;
} Doorbell;

typedef struct CpuidEntry {
    uint32_t leaf, subleaf, eax, ebx, ecx, edx; /* subleaf 0xffffffff matches all */
} CpuidEntry;

typedef struct Exit {
    uint32_t kind, size;
    uint64_t address, value; /* guest-physical address, port, MSR or vector; what is to be written */
    uint64_t gva;            /* of an MMIO access, ~0 where it is not known */
} Exit;

struct Partition;

typedef struct Vcpu {
    struct Partition *partition;
    int index;
    int created;
    int run_state;
    int entered;              /* a thread is inside mv_vcpu_run for it */
    int stop;                 /* STOP_*: to be returned to that thread */
    int kicked;               /* atomic, sticky */
    int init_pending;         /* atomic */
    int sipi_vector;          /* atomic, -1 none */
    int nmi_pending;          /* atomic */
    uint64_t tsc_offset;      /* guest TSC = guest time + this */
    uint64_t kvm_clock, kvm_wall; /* the paravirtual clock's MSRs */
    Apic apic;
    uint8_t context[ENV_SIZE] __attribute__((aligned(16))); /* state while another vCPU is loaded */
    Exit exit;
    uint32_t ended[8];         /* level-triggered vectors whose end was not yet told */
    int exception;            /* to be raised before the next instruction, -1 none */
    uint32_t exception_code;
    uint64_t exception_address;
    char detail[160];
    uint64_t registers[FLAT_WORDS]; /* when it crashed: another vCPU may be running by the time somebody asks */
} Vcpu;

typedef struct Counters {
    uint64_t pio, mmio, doorbells, latched, hlt, interrupts, switches, kicks;
} Counters;

typedef struct Partition {
    uint8_t *uc, *cpu, *env;
    int vcpu_count;
    Vcpu *loaded;
    Vcpu vcpus[MV_MAX_VCPUS];
    Region regions[MV_MAX_REGIONS];
    int region_count;
    int sealed; /* the holes are filled with MMIO */
    struct {
        uint64_t gpa, size;
    } holes[MV_MAX_REGIONS + 1];
    int hole_count;
    int tracking; /* some region has a dirty bitmap */
    int exits;    /* accesses stop the vCPU before they happen */
    Doorbell doorbells[MV_MAX_DOORBELLS];
    int doorbell_count;
    struct {
        uint32_t port; /* atomic; 0x10000 is free */
        uint32_t value;
    } latches[MV_MAX_LATCHES];
    CpuidEntry cpuid[MV_MAX_CPUID];
    int cpuid_count;
    Callbacks callbacks;
    Counters counters;
    uint32_t fills[3]; /* entries made in each TLB since it was last emptied */
    uint8_t fresh[ENV_SIZE] __attribute__((aligned(16))); /* processor state of a new engine */

    pthread_mutex_t lock; /* scheduling state below; never held while guest code runs */
    pthread_cond_t idle_cond, role_cond;
    int driving;    /* a thread is the driver */
    int idle;       /* atomic: the driver sleeps in idle_cond */
    int running;    /* atomic: guest code is being executed */
    int callback_failed; /* atomic: a Python callback raised; its exception waits on the Python side */
    int yield_wanted;
    int closing;
    int broken;     /* the engine gave up in mid-work and must not run again */
    jmp_buf escape; /* out of the running engine, for when it gives up */
    struct { /* an access whose handler raised: done, but its instruction has not retired */
        int kind, vcpu;
        uint32_t port, size;
        uint64_t value;
    } unretired;
    int64_t slice_end; /* guest time, APIC_NEVER when only one vCPU wants to run */
    int64_t next_due;  /* earliest APIC timer */
    int64_t clock_offset; /* guest time = host monotonic + this */
    int64_t frozen_at;
    int frozen;

    pthread_mutex_t ticker_lock;
    pthread_cond_t ticker_cond;
    pthread_t ticker;
    int ticker_alive, ticker_quit;
    int64_t ticker_wake; /* host time it sleeps until, APIC_NEVER while it waits for work; atomic */

    pthread_mutex_t dma_lock;
    int dma_pending; /* atomic: some region has pages written by the host */
} Partition;

/* engine.c */
int engine_load(const char *library, char *message, size_t size);
int engine_open(Partition *p, uint32_t code_buffer, char *message, size_t size);
void engine_close(Partition *p);
int engine_run(Partition *p); /* returns the library's error code */
void engine_stop(Partition *p);
void mv_env_get(uint8_t *env, uint64_t *flat);
int engine_halted(const Partition *p);
void engine_request(Partition *p, uint32_t bits);
void engine_unrequest(Partition *p, uint32_t bits);
void engine_poke(Partition *p);
void engine_flush_tlb(Partition *p);
int engine_map(Partition *p, Region *region);
int engine_unmap(Partition *p, uint64_t gpa, uint64_t size, Region *region);
int engine_map_hole(Partition *p, uint64_t gpa, uint64_t size);
void engine_cpuid(Partition *p, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
int engine_msr_read(Partition *p, uint32_t index, uint64_t *value);
int engine_msr_write(Partition *p, uint32_t index, uint64_t value);
int64_t engine_translate(Partition *p, uint64_t gva);
void engine_reset_state(uint8_t *env, const uint8_t *fresh);
void engine_sipi_state(uint8_t *env, const uint8_t *fresh, int vector);
void engine_mend_context(uint8_t *env);
void engine_store(Partition *p, uint8_t *context);
void engine_load_state(Partition *p, const uint8_t *context);
int engine_can_interrupt(const uint8_t *env);
int engine_interrupts_enabled(const uint8_t *env);
int engine_same_address_space(const uint8_t *a, const uint8_t *b);
uint64_t engine_rip(const uint8_t *env);

/* tlb.c */
extern __thread Partition *current __attribute__((tls_model("initial-exec"))); /* the engine this thread runs */
int tlb_load(void *handle, const char **missing);
void tlb_note_written(Region *r, uint64_t first, uint64_t last);
void tlb_forget_written(Partition *p, Region *r);
void tlb_forget_code(Partition *p, Region *r, uint64_t gpa, uint64_t size);

/* float.c */
int float_load(void *handle, const char **missing);

/* partition.c, called from the engine's helpers on the running thread */
void partition_service(Partition *p);
int partition_take_nmi(Partition *p);
int partition_take_vector(Partition *p);
int partition_callback_failed(const Partition *p);
uint64_t partition_tsc(Partition *p, const Vcpu *v);
uint64_t partition_pio_read(Partition *p, uint32_t port, uint32_t size);
void partition_pio_write(Partition *p, uint32_t port, uint32_t size, uint32_t value);
uint64_t partition_mmio_read(Partition *p, uint64_t gpa, uint32_t size);
void partition_mmio_write(Partition *p, uint64_t gpa, uint32_t size, uint64_t value);
void partition_pause_hint(Partition *p);
void partition_crash(Partition *p, int stop, const char *detail);
void partition_rescan(Partition *p);
int partition_msr_read(Partition *p, uint32_t index, uint64_t *value);
int partition_msr_write(Partition *p, uint32_t index, uint64_t value);
void partition_timer_changed(Partition *p);
Region *partition_region(Partition *p, uint64_t gpa, uint64_t size);
uint8_t *partition_state(Partition *p, Vcpu *v);

/* exits.c */
int exit_before(Partition *p, int kind, uint64_t address, uint32_t size, uint64_t value);
int exit_pending(const Vcpu *v);
void exit_end_of_interrupt(Partition *p, int vector);
int exit_take_exception(Partition *p, int *vector, uint32_t *code);

int64_t mv_time(Partition *p);

/* engine.c, for exits.c */
uint32_t *engine_hidden_flags(uint8_t *env, int second);
uint64_t engine_access_gva(void);
void engine_set_fault_address(uint8_t *env, uint64_t gva);

#endif
