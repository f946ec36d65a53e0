"""C layouts and numbers of the Linux KVM interface for x86-64, spelled as in <linux/kvm.h> and <asm/kvm.h>.

Only what this backend uses. `tests/abi/test_kvm_abi.py` compiles the headers and compares every size and offset.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, Union, c_char, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from typing import Final

KVM_API_VERSION: Final = 12

# Exit reasons, <linux/kvm.h>.
KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_DEBUG: Final = 4
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_IRQ_WINDOW_OPEN: Final = 7
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_SET_TPR: Final = 11
KVM_EXIT_TPR_ACCESS: Final = 12
KVM_EXIT_NMI: Final = 16
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_WATCHDOG: Final = 21
KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_EXIT_IOAPIC_EOI: Final = 26
KVM_EXIT_HYPERV: Final = 27
KVM_EXIT_X86_RDMSR: Final = 29
KVM_EXIT_X86_WRMSR: Final = 30
KVM_EXIT_DIRTY_RING_FULL: Final = 31
KVM_EXIT_AP_RESET_HOLD: Final = 32
KVM_EXIT_X86_BUS_LOCK: Final = 33
KVM_EXIT_XEN: Final = 34
KVM_EXIT_NOTIFY: Final = 37
KVM_EXIT_MEMORY_FAULT: Final = 39

KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1

KVM_INTERNAL_ERROR_EMULATION: Final = 1
KVM_INTERNAL_ERROR_SIMUL_EX: Final = 2
KVM_INTERNAL_ERROR_DELIVERY_EV: Final = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final = 1

KVM_SYSTEM_EVENT_SHUTDOWN: Final = 1
KVM_SYSTEM_EVENT_RESET: Final = 2
KVM_SYSTEM_EVENT_CRASH: Final = 3

# Capabilities.
KVM_CAP_USER_MEMORY: Final = 3
KVM_CAP_SET_TSS_ADDR: Final = 4
KVM_CAP_EXT_CPUID: Final = 7
KVM_CAP_NR_MEMSLOTS: Final = 10
KVM_CAP_MP_STATE: Final = 14
KVM_CAP_IRQ_ROUTING: Final = 25
KVM_CAP_IRQFD: Final = 32
KVM_CAP_SET_IDENTITY_MAP_ADDR: Final = 37
KVM_CAP_IOEVENTFD: Final = 36
KVM_CAP_ADJUST_CLOCK: Final = 39
KVM_CAP_VCPU_EVENTS: Final = 41
KVM_CAP_DEBUGREGS: Final = 50
KVM_CAP_XSAVE: Final = 55
KVM_CAP_XCRS: Final = 56
KVM_CAP_TSC_CONTROL: Final = 60
KVM_CAP_GET_TSC_KHZ: Final = 61
KVM_CAP_MAX_VCPUS: Final = 66
KVM_CAP_TSC_DEADLINE_TIMER: Final = 72
KVM_CAP_KVMCLOCK_CTRL: Final = 76
KVM_CAP_SIGNAL_MSI: Final = 77
KVM_CAP_READONLY_MEM: Final = 81
KVM_CAP_SPLIT_IRQCHIP: Final = 121
KVM_CAP_IMMEDIATE_EXIT: Final = 136
KVM_CAP_XSAVE2: Final = 208

# Flags.
KVM_MEM_LOG_DIRTY_PAGES: Final = 1
KVM_MEM_READONLY: Final = 2

KVM_IOEVENTFD_FLAG_DATAMATCH: Final = 1
KVM_IOEVENTFD_FLAG_DEASSIGN: Final = 4

KVM_IRQFD_FLAG_DEASSIGN: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2

KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1

KVM_MP_STATE_RUNNABLE: Final = 0
KVM_MP_STATE_UNINITIALIZED: Final = 1
KVM_MP_STATE_INIT_RECEIVED: Final = 2
KVM_MP_STATE_HALTED: Final = 3

KVM_VCPU_TSC_CTRL: Final = 0
KVM_VCPU_TSC_OFFSET: Final = 0

KVM_APIC_REG_SIZE: Final = 0x400
KVM_MAX_XCRS: Final = 16


# Names, field order and padding below are the kernel's.


class kvm_userspace_memory_region(Structure):
    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


class kvm_enable_cap(Structure):
    _fields_ = (("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))


class kvm_regs(Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *((f"r{number}", c_uint64) for number in range(8, 16)),
        ("rip", c_uint64),
        ("rflags", c_uint64),
    )


class kvm_segment(Structure):
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class kvm_dtable(Structure):
    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class kvm_sregs(Structure):
    _fields_ = (
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class kvm_mp_state(Structure):
    _fields_ = (("mp_state", c_uint32),)


class kvm_lapic_state(Structure):
    _fields_ = (("regs", c_uint8 * KVM_APIC_REG_SIZE),)


class kvm_debugregs(Structure):
    _fields_ = (
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    )


class kvm_xcr(Structure):
    _fields_ = (("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64))


class kvm_xcrs(Structure):
    _fields_ = (
        ("nr_xcrs", c_uint32),
        ("flags", c_uint32),
        ("xcrs", kvm_xcr * KVM_MAX_XCRS),
        ("padding", c_uint64 * 16),
    )


class kvm_xsave(Structure):
    _fields_ = (("region", c_uint32 * 1024),)


class _events_exception(Structure):
    _fields_ = (
        ("injected", c_uint8),
        ("nr", c_uint8),
        ("has_error_code", c_uint8),
        ("pending", c_uint8),
        ("error_code", c_uint32),
    )


class _events_interrupt(Structure):
    _fields_ = (("injected", c_uint8), ("nr", c_uint8), ("soft", c_uint8), ("shadow", c_uint8))


class _events_nmi(Structure):
    _fields_ = (("injected", c_uint8), ("pending", c_uint8), ("masked", c_uint8), ("pad", c_uint8))


class _events_smi(Structure):
    _fields_ = (("smm", c_uint8), ("pending", c_uint8), ("smm_inside_nmi", c_uint8), ("latched_init", c_uint8))


class kvm_vcpu_events(Structure):
    _fields_ = (
        ("exception", _events_exception),
        ("interrupt", _events_interrupt),
        ("nmi", _events_nmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", _events_smi),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    )


class kvm_msr_entry(Structure):
    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class kvm_msrs(Structure):
    """The header; entries follow."""

    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32))


class kvm_msr_list(Structure):
    """The header; indices follow."""

    _fields_ = (("nmsrs", c_uint32),)


class kvm_cpuid_entry2(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    )


class kvm_cpuid2(Structure):
    """The header; entries follow."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class kvm_translation(Structure):
    _fields_ = (
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    )


class kvm_dirty_log(Structure):
    _fields_ = (("slot", c_uint32), ("padding1", c_uint32), ("dirty_bitmap", c_uint64))


class kvm_msi(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("address_lo", "address_hi", "data", "flags", "devid")),
        ("pad", c_uint8 * 12),
    )


class kvm_irqfd(Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("fd", "gsi", "flags", "resamplefd")),
        ("pad", c_uint8 * 16),
    )


class kvm_ioeventfd(Structure):
    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class kvm_irq_routing_entry(Structure):
    """With the MSI member of the union."""

    _fields_ = (
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("devid", c_uint32),
        ("union_pad", c_uint32 * 4),
    )


class kvm_irq_routing(Structure):
    """The header; entries follow."""

    _fields_ = (("nr", c_uint32), ("flags", c_uint32))


class kvm_clock_data(Structure):
    _fields_ = (
        ("clock", c_uint64),
        ("flags", c_uint32),
        ("pad0", c_uint32),
        ("realtime", c_uint64),
        ("host_tsc", c_uint64),
        ("pad", c_uint32 * 4),
    )


class kvm_device_attr(Structure):
    _fields_ = (("flags", c_uint32), ("group", c_uint32), ("attr", c_uint64), ("addr", c_uint64))


class _run_io(Structure):
    _fields_ = (
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    )


class _run_mmio(Structure):
    _fields_ = (("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8))


class _run_fail_entry(Structure):
    _fields_ = (("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32))


class _run_internal(Structure):
    _fields_ = (("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class _run_system_event(Structure):
    _fields_ = (("type", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16))


class _run_union(Union):
    _fields_ = (
        ("hardware_exit_reason", c_uint64),
        ("io", _run_io),
        ("mmio", _run_mmio),
        ("fail_entry", _run_fail_entry),
        ("internal", _run_internal),
        ("system_event", _run_system_event),
        ("eoi_vector", c_uint8),
        ("padding", c_char * 256),
    )


class kvm_run(Structure):
    """Up to the union; the synchronised registers behind it are not used."""

    _anonymous_ = ("u",)
    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("u", _run_union),
    )


# ioctl numbers: _IO(0xAE, nr), _IOW, _IOR, _IOWR from <asm-generic/ioctl.h>.

_KVMIO: Final = 0xAE00


def _w(number: int, layout: type[ctypes._CData]) -> int:
    return 1 << 30 | sizeof(layout) << 16 | _KVMIO | number


def _r(number: int, layout: type[ctypes._CData]) -> int:
    return 2 << 30 | sizeof(layout) << 16 | _KVMIO | number


def _wr(number: int, layout: type[ctypes._CData]) -> int:
    return 3 << 30 | sizeof(layout) << 16 | _KVMIO | number


KVM_GET_API_VERSION: Final = _KVMIO | 0x00
KVM_CREATE_VM: Final = _KVMIO | 0x01
KVM_GET_MSR_INDEX_LIST: Final = _wr(0x02, kvm_msr_list)
KVM_CHECK_EXTENSION: Final = _KVMIO | 0x03
KVM_GET_VCPU_MMAP_SIZE: Final = _KVMIO | 0x04
KVM_GET_SUPPORTED_CPUID: Final = _wr(0x05, kvm_cpuid2)
KVM_CREATE_VCPU: Final = _KVMIO | 0x41
KVM_GET_DIRTY_LOG: Final = _w(0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION: Final = _w(0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR: Final = _KVMIO | 0x47
KVM_SET_IDENTITY_MAP_ADDR: Final = _w(0x48, c_uint64)
KVM_SET_GSI_ROUTING: Final = _w(0x6A, kvm_irq_routing)
KVM_IRQFD: Final = _w(0x76, kvm_irqfd)
KVM_IOEVENTFD: Final = _w(0x79, kvm_ioeventfd)
KVM_SET_CLOCK: Final = _w(0x7B, kvm_clock_data)
KVM_GET_CLOCK: Final = _r(0x7C, kvm_clock_data)
KVM_RUN: Final = _KVMIO | 0x80
KVM_GET_REGS: Final = _r(0x81, kvm_regs)
KVM_SET_REGS: Final = _w(0x82, kvm_regs)
KVM_GET_SREGS: Final = _r(0x83, kvm_sregs)
KVM_SET_SREGS: Final = _w(0x84, kvm_sregs)
KVM_TRANSLATE: Final = _wr(0x85, kvm_translation)
KVM_GET_MSRS: Final = _wr(0x88, kvm_msrs)
KVM_SET_MSRS: Final = _w(0x89, kvm_msrs)
KVM_GET_LAPIC: Final = _r(0x8E, kvm_lapic_state)
KVM_SET_LAPIC: Final = _w(0x8F, kvm_lapic_state)
KVM_SET_CPUID2: Final = _w(0x90, kvm_cpuid2)
KVM_GET_MP_STATE: Final = _r(0x98, kvm_mp_state)
KVM_SET_MP_STATE: Final = _w(0x99, kvm_mp_state)
KVM_GET_VCPU_EVENTS: Final = _r(0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS: Final = _w(0xA0, kvm_vcpu_events)
KVM_GET_DEBUGREGS: Final = _r(0xA1, kvm_debugregs)
KVM_SET_DEBUGREGS: Final = _w(0xA2, kvm_debugregs)
KVM_SET_TSC_KHZ: Final = _KVMIO | 0xA2
KVM_ENABLE_CAP: Final = _w(0xA3, kvm_enable_cap)
KVM_GET_TSC_KHZ: Final = _KVMIO | 0xA3
KVM_GET_XSAVE: Final = _r(0xA4, kvm_xsave)
KVM_SET_XSAVE: Final = _w(0xA5, kvm_xsave)
KVM_SIGNAL_MSI: Final = _w(0xA5, kvm_msi)
KVM_GET_XCRS: Final = _r(0xA6, kvm_xcrs)
KVM_SET_XCRS: Final = _w(0xA7, kvm_xcrs)
KVM_KVMCLOCK_CTRL: Final = _KVMIO | 0xAD
KVM_GET_XSAVE2: Final = _r(0xCF, kvm_xsave)
KVM_SET_DEVICE_ATTR: Final = _w(0xE1, kvm_device_attr)
KVM_GET_DEVICE_ATTR: Final = _w(0xE2, kvm_device_attr)
KVM_HAS_DEVICE_ATTR: Final = _w(0xE3, kvm_device_attr)

# Model-specific registers this backend handles by name.
MSR_IA32_TSC: Final = 0x10
MSR_IA32_MCG_CAP: Final = 0x179
MSR_IA32_MCG_STATUS: Final = 0x17A
MSR_IA32_MCG_CTL: Final = 0x17B
MSR_IA32_MISC_ENABLE: Final = 0x1A0
MSR_MTRRdefType: Final = 0x2FF
MSR_IA32_TSC_DEADLINE: Final = 0x6E0
