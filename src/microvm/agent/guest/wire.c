/* Encoding and decoding of payloads: little-endian, unaligned, bounds checked. */
#include "wire.h"

#include <string.h>

static uint8_t *take(struct reader *reader, size_t size)
{
    static uint8_t zeroes[8];
    if (reader->bad || (size_t)(reader->end - reader->at) < size) {
        reader->bad = 1;
        return size <= sizeof zeroes ? zeroes : NULL;
    }
    uint8_t *at = reader->at;
    reader->at += size;
    return at;
}

uint8_t get_u8(struct reader *reader)
{
    return *take(reader, 1);
}

uint16_t get_u16(struct reader *reader)
{
    uint16_t value;
    memcpy(&value, take(reader, sizeof value), sizeof value);
    return value;
}

uint32_t get_u32(struct reader *reader)
{
    uint32_t value;
    memcpy(&value, take(reader, sizeof value), sizeof value);
    return value;
}

uint64_t get_u64(struct reader *reader)
{
    uint64_t value;
    memcpy(&value, take(reader, sizeof value), sizeof value);
    return value;
}

char *get_string(struct reader *reader)
{
    static char empty[1];
    uint32_t size = get_u32(reader);
    if (reader->bad || size >= (size_t)(reader->end - reader->at) || reader->at[size] != 0 ||
        memchr(reader->at, 0, size)) {
        reader->bad = 1;
        empty[0] = 0;
        return empty;
    }
    return (char *)take(reader, (size_t)size + 1);
}

void put_bytes(struct writer *writer, const void *data, size_t size)
{
    size_t room = (size_t)(writer->end - writer->at);
    if (size > room)
        size = room;
    memcpy(writer->at, data, size);
    writer->at += size;
}

void put_u32(struct writer *writer, uint32_t value)
{
    put_bytes(writer, &value, sizeof value);
}

void put_u64(struct writer *writer, uint64_t value)
{
    put_bytes(writer, &value, sizeof value);
}

void put_string(struct writer *writer, const char *text)
{
    size_t size = strlen(text);
    put_u32(writer, (uint32_t)size);
    put_bytes(writer, text, size + 1);
}
