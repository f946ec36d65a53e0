/* What the files of the guest agent share. One process, one thread, one poll loop. */
#ifndef AGENT_H
#define AGENT_H

#include <stdarg.h>
#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

/* ---- options.c: the kernel command line, `microvm.` prefix ---- */

struct options {
    char root[64];         /* block device, empty: stay in the initramfs */
    char rootfstype[16];   /* empty: by its magic */
    char overlay[64];      /* tmpfs, a block device, `none` (read-only) or `direct` (the root disk is written) */
    char overlay_size[16]; /* as tmpfs takes it: 50%, 512m */
    char hostname[65];
    uint32_t port;
    int off_by_reset; /* the machine cannot power off: ask for a reset */
    int debug;
};

extern struct options options;
void options_parse(char *cmdline);
void options_read(void);

/* ---- system.c ---- */

extern int testing;         /* serving a test as an ordinary process: touch nothing of the system */
extern int frozen_disk_fd;  /* directory on the disk that takes the writes, or -1 */
extern uint64_t started_ns; /* CLOCK_BOOTTIME at entry */

uint64_t now_ns(void);
uint64_t boot_ns(void);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void debug(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void power_off(int restart);
_Noreturn void die(const char *what, int error);
_Noreturn void shut_down(int restart, uint64_t grace_ns);
/* Fills a buffer from a small file; returns the length (NUL added) or -errno. */
int read_small_file(const char *path, char *buffer, size_t size);

/* ---- boot.c, root.c: what process 1 does first; a failure is a sentence in `boot_error` ---- */

extern char boot_error[256];
int boot_fail(const char *what, const char *detail, int error);
void boot(void);
int switch_to_root(void);
int mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *data);

/* ---- conn.c: one stream to the host, framed ---- */

enum conn_state { CONN_IDLE, CONN_CONNECTING, CONN_EXEC, CONN_READ, CONN_WRITE, CONN_LIST, CONN_CLOSED };

struct transfer; /* files.c */
struct command;  /* exec.c */

struct conn {
    struct conn *next;
    int fd;
    enum conn_state state;
    uint8_t *in; /* a frame that has not arrived whole */
    size_t in_size, in_capacity;
    uint8_t *out; /* frames that have not been sent: out[out_start .. out_end) */
    size_t out_start, out_end, out_capacity;
    struct command *command;
    struct transfer *transfer;
    int closing; /* close once everything is sent */
    int poll_slot;
};

extern struct conn *conns;
extern int conn_count;

struct conn *conn_new(int fd);
void conn_close(struct conn *conn);
void conn_input(struct conn *conn);
void conn_flush(struct conn *conn);
size_t conn_pending(const struct conn *conn);
/* Room for `size` bytes of payload after a header; conn_frame_end says how many were used. NULL: connection closed. */
uint8_t *conn_frame_begin(struct conn *conn, size_t size);
void conn_frame_end(struct conn *conn, uint8_t type, uint32_t arg, size_t size);
void conn_frame(struct conn *conn, uint8_t type, uint32_t arg, const void *payload, size_t size);
void conn_ok(struct conn *conn);
void conn_error(struct conn *conn, int error, const char *stage);
void conn_protocol_error(struct conn *conn, const char *what);

/* ---- dispatch.c ---- */

void handle_frame(struct conn *conn, uint8_t type, uint32_t arg, uint8_t *payload, size_t size);

/* ---- exec.c: commands ---- */

struct command {
    struct command *next;
    struct conn *conn; /* NULL once the host has left */
    pid_t pid;
    struct group *group;
    uint32_t flags;
    int stdin_fd, out_fd[2]; /* [0] stdout or the pty, [1] stderr; -1 when closed */
    int stdin_ended;
    int exited;
    uint8_t *stdin_data; /* accepted from the host, not yet taken by the command */
    size_t stdin_start, stdin_end;
    uint32_t stdin_credit; /* what the host may still send */
    uint32_t stdin_taken;  /* taken by the command and not yet granted again */
    uint64_t window[2];    /* what the host still accepts */
    int end_sent[2];
    uint64_t start_ns, deadline_ns, end_due_ns, drain_until_ns;
    uint32_t exit_flags;
    int status;
    uint64_t wall_ns, user_us, system_us, maxrss_kib;
    int poll_slot[3];
};

extern struct command *commands;

void exec_request(struct conn *conn, struct reader *reader);
void exec_data(struct conn *conn, const uint8_t *data, size_t size);
void exec_end(struct conn *conn);
void exec_window(struct conn *conn, uint32_t stream, uint32_t credit);
void exec_signal(struct conn *conn, uint32_t signal);
void exec_resize(struct conn *conn, uint16_t rows, uint16_t columns);
void exec_disconnected(struct command *command);
void exec_output(struct command *command, int which);
void exec_feed(struct command *command);
void exec_stdin_broken(struct command *command);
void exec_finish(struct command *command);
void exec_send_ends(struct command *command);
void exec_sweep(void);
int exec_wants_output(const struct command *command, int which);
void reap(void);
uint64_t exec_timers(uint64_t now);

/* ---- spawn.c ---- */

struct spawn_limit {
    uint32_t resource;
    uint64_t soft, hard;
};

struct spawn {
    char **argv, **envp;
    const char *path, *cwd;
    uint32_t flags;
    int stdio[3]; /* -1: /dev/null */
    int pty;      /* stdio[0] becomes the controlling terminal */
    uid_t uid;
    gid_t gid;
    int set_user;
    gid_t *groups;
    size_t group_count;
    struct spawn_limit *limits;
    size_t limit_count;
    int (*builtin)(char **argv);
    /* set by the child */
    const char *stage;
    int error;
};

/* Returns the pid, or -1 with stage and error set. */
pid_t spawn_process(struct spawn *spawn, int cgroup_fd);
int open_pty(uint16_t rows, uint16_t columns, int *slave);

/* ---- group.c: everything that a command started, to be ended together ---- */

struct group;
void groups_open(const char *directory);
struct group *group_take(void);
int group_fd(const struct group *group);
void group_give_back(struct group *group);
/* The command with this session is gone or must go: end all that belongs to it. */
void group_kill(struct group *group, pid_t session);

/* ---- users.c ---- */

struct user {
    uid_t uid;
    gid_t gid;
    gid_t groups[64];
    size_t group_count;
    char name[64], home[256];
};

/* `name`, `uid`, `name:group`, `uid:gid`. Returns 0 or an errno. */
int user_find(const char *text, struct user *user);

/* ---- files.c, transfer.c: file requests, done here and now ---- */

struct transfer {
    int fd;
    void *directory;    /* DIR of a listing */
    uint64_t remaining; /* still to be read; of a write, what was announced */
    uint64_t written;
    int error; /* the rest is swallowed until the host ends it */
    uint32_t flags, mode, uid, gid;
    char path[4096], temporary[4096]; /* temporary is empty when the file is written in place */
};

void file_request(struct conn *conn, uint8_t type, struct reader *reader);
void read_request(struct conn *conn, struct reader *reader);
void list_request(struct conn *conn, struct reader *reader);
void write_request(struct conn *conn, struct reader *reader);
void file_data(struct conn *conn, const uint8_t *data, size_t size);
void file_end(struct conn *conn);
void file_continue(struct conn *conn);
struct transfer *transfer_new(struct conn *conn);
void transfer_free(struct conn *conn);

struct stat;
enum { RECORD_MAX = 48 + 2 * 4200 };
/* What the host is told of a file: what stat says, its name and, of a symbolic link, its target. */
void put_record(struct writer *writer, const struct stat *status, const char *name, const char *target);

/* ---- tree_send.c, tree_receive.c, tree_remove.c: work on whole trees, in a process of its own ---- */

typedef int (*builtin_fn)(char **argv);
builtin_fn builtin_find(const char *name);
/* Reports a failed builtin: the path on stderr, the errno as the exit code. */
int builtin_fail(const char *path, int error);
int tree_send(char **argv);
int tree_receive(char **argv);
int tree_remove(char **argv);
int write_all(int fd, const void *data, size_t size);

/* ---- control.c: requests about the machine ---- */

void control_request(struct conn *conn, uint8_t type, struct reader *reader);

/* ---- loop.c ---- */

_Noreturn void serve(int listener, int announce);
int vsock_listen(uint32_t port);

#endif
