/*
 * The least a monitor can do: how many exits a second this machine's KVM makes when nothing but a C loop serves them.
 * bench/kvm_exits.py compiles and runs it beside the package. Usage: kvm_exits pio|mmio|doorbell COUNT; prints seconds.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

enum { MEMORY = 1 << 20, CODE = 0x1000, STOP_PORT = 0x3f9, WINDOW = 0xd0000000u };

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static int call(int fd, unsigned long request, void *argument, const char *what)
{
	int result = ioctl(fd, request, argument);
	if (result < 0)
		fail(what);
	return result;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	uint32_t count = (uint32_t)atoi(argv[2]);
	/* Real mode with flat segments: mov ecx, count; mov edi, WINDOW; mov dx, 0x3f8 */
	uint8_t code[64] = { 0x66, 0xb9, 0, 0, 0, 0, 0x66, 0xbf, 0, 0, 0, 0xd0, 0xba, 0xf8, 0x03 };
	size_t size = 15;
	memcpy(code + 2, &count, 4);
	size_t loop = size;
	if (!strcmp(argv[1], "pio")) {
		code[size++] = 0xee; /* out dx, al */
	} else {
		memcpy(code + size, "\x67\x66\x89\x07", 4); /* mov [edi], eax */
		size += 4;
	}
	memcpy(code + size, "\x66\x49\x75", 3); /* dec ecx; jnz loop */
	size += 3;
	code[size] = (uint8_t)(loop - (size + 1));
	size++;
	memcpy(code + size, "\x42\xee\xeb\xfe", 4); /* inc dx; out dx, al; jmp $ */

	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		fail("/dev/kvm");
	int vm = call(kvm, KVM_CREATE_VM, 0, "KVM_CREATE_VM");
	struct kvm_enable_cap split = { .cap = KVM_CAP_SPLIT_IRQCHIP, .args = { 24 } };
	call(vm, KVM_ENABLE_CAP, &split, "KVM_CAP_SPLIT_IRQCHIP");
	uint8_t *memory = mmap(0, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	memcpy(memory + CODE, code, sizeof code);
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY, .userspace_addr = (uintptr_t)memory };
	call(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
	if (!strcmp(argv[1], "doorbell")) {
		struct kvm_ioeventfd bell = { .addr = WINDOW, .len = 4, .fd = eventfd(0, EFD_NONBLOCK),
					      .flags = KVM_IOEVENTFD_FLAG_DATAMATCH };
		call(vm, KVM_IOEVENTFD, &bell, "KVM_IOEVENTFD");
	}
	int vcpu = call(vm, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU");
	int run_size = call(kvm, KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE");
	struct kvm_run *run = mmap(0, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		fail("mmap");
	struct kvm_sregs sregs;
	call(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
	struct kvm_segment flat = { .limit = 0xffffffff, .type = 3, .present = 1, .s = 1, .g = 1 };
	sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
	flat.type = 11;
	sregs.cs = flat;
	call(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	call(vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");

	struct timespec start, end;
	uint64_t sum = 0;
	clock_gettime(CLOCK_MONOTONIC, &start);
	for (;;) {
		call(vcpu, KVM_RUN, 0, "KVM_RUN");
		if (run->exit_reason == KVM_EXIT_IO) {
			sum += ((uint8_t *)run)[run->io.data_offset];
			if (run->io.port == STOP_PORT)
				break;
		} else if (run->exit_reason == KVM_EXIT_MMIO) {
			sum += *(uint32_t *)run->mmio.data;
		} else {
			fprintf(stderr, "exit %u\n", run->exit_reason);
			return 1;
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.9f %llu\n", (end.tv_sec - start.tv_sec) + (end.tv_nsec - start.tv_nsec) * 1e-9, (unsigned long long)sum);
	return 0;
}
