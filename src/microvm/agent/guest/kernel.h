/* Kernel interfaces that the C library's headers lack (musl-gcc sees no linux headers). Values from the uapi headers. */
#ifndef KERNEL_H
#define KERNEL_H

#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#ifndef AF_VSOCK
#define AF_VSOCK 40
#endif
#define VMADDR_CID_ANY UINT32_MAX
#define VMADDR_CID_HOST 2u

struct sockaddr_vm_ {
    uint16_t family, reserved;
    uint32_t port, cid;
    uint8_t flags, zero[3];
};

#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#endif
#ifndef SYS_finit_module
#define SYS_finit_module 313
#endif
#define CLONE_INTO_CGROUP_ 0x200000000ull
#define MODULE_INIT_COMPRESSED_FILE_ 4

struct clone_args_ {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};


#define FIFREEZE_ _IOWR('X', 119, int)
#define FITHAW_ _IOWR('X', 120, int)
#define RNDADDENTROPY_ _IOW('R', 0x03, int[2])
#define RNDRESEEDCRNG_ _IO('R', 0x07)
#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif

#define CGROUP2_MAGIC_ 0x63677270

