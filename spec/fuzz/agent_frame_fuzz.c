/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest agent's parsers on any bytes. The first byte picks one: a stream of
 * frames whose requests are parsed as the agent does, one request, or a user
 * looked up in two made-up files. What a parser accepts must keep its own
 * promises: lists terminated, counts within limits, texts without holes.
 */
#include "frame.c"
#include "request.c"
#include "users.c"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void require(bool ok)
{
    if (!ok)
        abort();
}

static void check_list(char **list, size_t count)
{
    for (size_t i = 0; i < count; i++)
        require(list[i] != NULL);
    require(count == 0 || list[count] == NULL);
}

static void parse_exec(const uint8_t *data, size_t size)
{
    struct sm_exec_req r;
    if (sm_exec_parse(data, size, &r) == 0) {
        require(r.argc > 0 && r.chain.count <= SM_CHAIN_MAX && r.stop_signal <= 64);
        check_list(r.argv, r.argc);
        check_list(r.env, r.envc);
    }
    sm_exec_free(&r);
}

static void parse_file(const uint8_t *data, size_t size)
{
    struct sm_file_req r;
    if (sm_file_parse(data, size, &r) == 0)
        require(r.path[0] == '/' && r.mode <= 07777);
    sm_file_free(&r);
}

static void parse_boot(const uint8_t *data, size_t size)
{
    struct sm_boot_req r;
    if (sm_boot_parse(data, size, &r) == 0)
        for (unsigned i = 0; i < r.mount_count; i++)
            require(r.mounts[i].target[0] == '/' && r.mounts[i].options);
    sm_boot_free(&r);
}

static void parse_stream(const uint8_t *data, size_t size)
{
    struct sm_frame f;
    long used;
    while ((used = sm_frame_next(data, size, &f)) > 0) {
        require((size_t)used <= size && f.len <= SM_FRAME_PAYLOAD_MAX);
        if (f.type == SM_EXEC)
            parse_exec(f.payload, f.len);
        else if (f.type == SM_BOOT)
            parse_boot(f.payload, f.len);
        else if (f.type == SM_FILE_PUT || f.type == SM_FILE_GET)
            parse_file(f.payload, f.len);
        data += used;
        size -= (size_t)used;
    }
}

/* spec NUL passwd NUL group */
static void look_up(const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;
    const uint8_t *passwd = size ? memchr(data, 0, size) : NULL;
    if (!passwd)
        return;
    passwd++;
    const uint8_t *group = memchr(passwd, 0, (size_t)(end - passwd));
    const uint8_t *stop = group ? group++ : end;
    struct sm_ident who;
    if (sm_ident_resolve((const char *)data, (const char *)passwd, (size_t)(stop - passwd),
                         (const char *)group, group ? (size_t)(end - group) : 0, &who) == 0) {
        require(who.group_count <= SM_IDENT_GROUPS_MAX && who.uid != UINT32_MAX);
        require(memchr(who.home, 0, sizeof(who.home)) != NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const parsers[])(const uint8_t *, size_t) = { parse_stream, parse_exec,
                                                               parse_file, parse_boot, look_up };
    if (size > 0)
        parsers[data[0] % 5](data + 1, size - 1);
    return 0;
}
