/* A connection to the host: whole frames in, frames out through one buffer that is flushed after each step. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

struct conn *conns;
int conn_count;

struct conn *conn_new(int fd)
{
    struct conn *conn = calloc(1, sizeof *conn);
    if (!conn) {
        close(fd);
        return NULL;
    }
    conn->fd = fd;
    conn->next = conns;
    conns = conn;
    conn_count++;
    return conn;
}

/* The loop frees closed connections at the end of its round; until then pointers to them stay valid. */
void conn_close(struct conn *conn)
{
    if (conn->state == CONN_CLOSED)
        return;
    if (conn->command)
        exec_disconnected(conn->command);
    if (conn->transfer)
        transfer_free(conn);
    conn->state = CONN_CLOSED;
    close(conn->fd);
    conn->fd = -1;
    free(conn->in);
    free(conn->out);
    conn->in = conn->out = NULL;
    conn->in_size = conn->out_start = conn->out_end = 0;
}

size_t conn_pending(const struct conn *conn)
{
    return conn->out_end - conn->out_start;
}

uint8_t *conn_frame_begin(struct conn *conn, size_t size)
{
    if (conn->state == CONN_CLOSED)
        return NULL;
    if (conn->out_start && conn->out_capacity - conn->out_end < size + HEADER_SIZE) {
        memmove(conn->out, conn->out + conn->out_start, conn_pending(conn));
        conn->out_end -= conn->out_start;
        conn->out_start = 0;
    }
    size_t needed = conn->out_end + size + HEADER_SIZE;
    if (needed > conn->out_capacity) {
        size_t capacity = needed < 4096 ? 4096 : needed + 1024;
        uint8_t *bigger = realloc(conn->out, capacity);
        if (!bigger) {
            conn_close(conn);
            return NULL;
        }
        conn->out = bigger;
        conn->out_capacity = capacity;
    }
    return conn->out + conn->out_end + HEADER_SIZE;
}

void conn_frame_end(struct conn *conn, uint8_t type, uint32_t arg, size_t size)
{
    struct writer header = {conn->out + conn->out_end, conn->out + conn->out_end + HEADER_SIZE};
    put_u32(&header, (uint32_t)size);
    put_u32(&header, type | arg << 8);
    conn->out_end += HEADER_SIZE + size;
}

void conn_frame(struct conn *conn, uint8_t type, uint32_t arg, const void *payload, size_t size)
{
    uint8_t *to = conn_frame_begin(conn, size);
    if (!to)
        return;
    memcpy(to, payload, size);
    conn_frame_end(conn, type, arg, size);
}

void conn_ok(struct conn *conn)
{
    conn_frame(conn, REPLY_OK, 0, "", 0);
}

/* `stage` says what was refused; the text goes along because errno numbers differ between systems. */
void conn_error(struct conn *conn, int error, const char *stage)
{
    uint8_t payload[512];
    struct writer writer = {payload, payload + sizeof payload};
    put_u32(&writer, (uint32_t)error);
    put_string(&writer, stage);
    put_string(&writer, strerror(error));
    conn_frame(conn, REPLY_ERROR, 0, payload, (size_t)(writer.at - payload));
}

void conn_protocol_error(struct conn *conn, const char *what)
{
    conn_error(conn, EPROTO, what);
    conn->closing = 1;
    if (conn->command)
        exec_disconnected(conn->command);
}

void conn_flush(struct conn *conn)
{
    while (conn->state != CONN_CLOSED && conn->state != CONN_CONNECTING && conn_pending(conn)) {
        ssize_t sent = send(conn->fd, conn->out + conn->out_start, conn_pending(conn), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN)
                conn_close(conn);
            return;
        }
        conn->out_start += (size_t)sent;
    }
    if (!conn_pending(conn))
        conn->out_start = conn->out_end = 0;
    if (conn->closing && conn->state != CONN_CLOSED)
        conn_close(conn);
}

static uint32_t word(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Handles the whole frames at `data`; returns how many bytes they were. */
static size_t take_frames(struct conn *conn, uint8_t *data, size_t size)
{
    size_t used = 0;
    while (size - used >= HEADER_SIZE && conn->state != CONN_CLOSED && !conn->closing) {
        uint32_t length = word(data + used), tag = word(data + used + 4);
        uint8_t type = (uint8_t)tag;
        if (length > (type < MSG_DATA ? MAX_REQUEST : MAX_DATA)) {
            conn_protocol_error(conn, "frame too long");
            break;
        }
        if (size - used - HEADER_SIZE < length)
            break;
        handle_frame(conn, type, tag >> 8, data + used + HEADER_SIZE, length);
        used += HEADER_SIZE + length;
    }
    return used;
}

static int keep(struct conn *conn, const uint8_t *data, size_t size)
{
    size_t needed = conn->in_size + size;
    if (needed > conn->in_capacity) {
        uint8_t *bigger = realloc(conn->in, needed + 4096);
        if (!bigger)
            return -1;
        conn->in = bigger;
        conn->in_capacity = needed + 4096;
    }
    memcpy(conn->in + conn->in_size, data, size);
    conn->in_size = needed;
    return 0;
}

/* One receive. Frames that came whole are handled where they lie; the rest waits in conn->in, which never exceeds the
 * longest frame plus one receive. */
void conn_input(struct conn *conn)
{
    static uint8_t scratch[128 << 10];
    ssize_t got = recv(conn->fd, scratch, sizeof scratch, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        conn_close(conn);
        return;
    }
    if (conn->in_size) {
        if (keep(conn, scratch, (size_t)got) != 0) {
            conn_close(conn);
            return;
        }
        size_t used = take_frames(conn, conn->in, conn->in_size);
        if (conn->state == CONN_CLOSED)
            return;
        memmove(conn->in, conn->in + used, conn->in_size - used);
        conn->in_size -= used;
        if (!conn->in_size) {
            free(conn->in);
            conn->in = NULL;
            conn->in_capacity = 0;
        }
        return;
    }
    size_t used = take_frames(conn, scratch, (size_t)got);
    if (conn->state != CONN_CLOSED && !conn->closing && used < (size_t)got &&
        keep(conn, scratch + used, (size_t)got - used) != 0)
        conn_close(conn);
}
