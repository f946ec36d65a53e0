/* The frames that the host and this program exchange. microvm/agent/protocol.py documents every one of them. */
#ifndef WIRE_H
#define WIRE_H

#include <stddef.h>
#include <stdint.h>

enum {
    PROTOCOL_VERSION = 1,
    HEADER_SIZE = 8,
    MAX_REQUEST = 1 << 20,  /* argv and environment of one command, or one path */
    MAX_DATA = 64 << 10,    /* payload of a data frame that is accepted */
    DATA_CHUNK = 60 << 10,  /* payload of a data frame that is sent: with its header it fits one 64 KiB vsock packet */
    STDIN_WINDOW = 64 << 10 /* what the host may send to stdin before it is granted more */
};

enum request_type {
    REQ_EXEC = 0x01,
    REQ_PING = 0x02,
    REQ_INFO = 0x03,
    REQ_CLOCK_SET = 0x04,
    REQ_RESEED = 0x05,
    REQ_SYNC = 0x06,
    REQ_FREEZE = 0x07,
    REQ_THAW = 0x08,
    REQ_SHUTDOWN = 0x09,
    REQ_RENEW = 0x0A,
    REQ_FILE_READ = 0x10,
    REQ_FILE_WRITE = 0x11,
    REQ_STAT = 0x12,
    REQ_LIST = 0x13,
    REQ_MKDIR = 0x14,
    REQ_REMOVE = 0x15,
    REQ_RENAME = 0x16,
    REQ_SYMLINK = 0x17,
    REQ_SET_ATTR = 0x18
};

enum stream_type { MSG_DATA = 0x40, MSG_END = 0x41, MSG_WINDOW = 0x42, MSG_SIGNAL = 0x43, MSG_RESIZE = 0x44 };

enum reply_type { REPLY_OK = 0x80, REPLY_ERROR = 0x81, REPLY_STARTED = 0x82, REPLY_EXIT = 0x83, REPLY_READY = 0x84 };

enum stream { STREAM_STDIN = 0, STREAM_STDOUT = 1, STREAM_STDERR = 2 };

enum exec_flag {
    EXEC_PTY = 1,
    EXEC_ENV_REPLACE = 2,
    EXEC_NO_NEW_PRIVS = 4,
    EXEC_WANT_STARTED = 8,
    EXEC_LEAVE = 16, /* what the command leaves running lives on */
    EXEC_BUILTIN = 32
};

enum stdio_mode { STDIO_NULL = 0, STDIO_STREAM = 1, STDIO_MERGE = 2 };

enum exit_flag { EXIT_TIMED_OUT = 1, EXIT_CORE = 2 };

enum write_flag { WRITE_IN_PLACE = 1, WRITE_APPEND = 2, WRITE_PARENTS = 4, WRITE_EXCLUSIVE = 8 };

enum path_flag { PATH_NOFOLLOW = 1, PATH_PARENTS = 2, PATH_MISSING_OK = 4 };

#define KEEP UINT32_MAX /* a mode, uid or gid that is to stay as it is */

/* Takes values off a payload. Anything that does not fit sets `bad` and yields zeroes from then on. */
struct reader {
    uint8_t *at, *end;
    int bad;
};

uint8_t get_u8(struct reader *reader);
uint16_t get_u16(struct reader *reader);
uint32_t get_u32(struct reader *reader);
uint64_t get_u64(struct reader *reader);
/* A string that is NUL-terminated where it lies: no copy. */
char *get_string(struct reader *reader);

struct writer {
    uint8_t *at, *end;
};

void put_u32(struct writer *writer, uint32_t value);
void put_u64(struct writer *writer, uint64_t value);
void put_bytes(struct writer *writer, const void *data, size_t size);
void put_string(struct writer *writer, const char *text);

#endif
