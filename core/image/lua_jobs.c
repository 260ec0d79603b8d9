/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs of sm.image_core: ingest, merge and digest; the interface is told in
 * lua_image.c. A job's userdata owns its task (copied strings, results) and the
 * thread that works on it. Only the thread touches the task until the job is
 * done; the userdata is created closed and filled last.
 */
#include "lua_image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "archive.h"
#include "job.h"
#include "layer.h"
#include "merge.h"

struct task {
    sm_image_job_fn *run;
    void (*push)(lua_State *L, const struct task *t);
    struct sm_image_limits limits;
    char *path, *out, *diff_id; /* owned */
    char **layers;              /* owned, n_layers + 1 with NULL */
    uint32_t n_layers;
    enum sm_digest_kind kind;
    struct sm_layer_result layer;
    struct sm_merge_result merge;
    struct sm_archive_result archive;
    struct sm_pack_result pack;
    char digest[SM_DIGEST_TEXT];
};

struct box {
    struct sm_image_job *job; /* NULL when closed */
    struct task *task;
};

static void task_free(struct task *t)
{
    if (!t)
        return;
    for (uint32_t i = 0; t->layers && t->layers[i]; i++)
        free(t->layers[i]);
    free(t->layers);
    free(t->path);
    free(t->out);
    free(t->diff_id);
    free(t->merge.layer_bytes);
    sm_archive_result_free(&t->archive);
    free(t);
}

static int run_ingest(void *arg, struct sm_image_progress *p, struct sm_image_error *e)
{
    struct task *t = arg;
    struct sm_layer_config cfg = { .blob = t->path, .out = t->out, .diff_id = t->diff_id,
                                   .limits = t->limits, .progress = p };

    return sm_layer_ingest(&cfg, &t->layer, e);
}

static int run_merge(void *arg, struct sm_image_progress *p, struct sm_image_error *e)
{
    struct task *t = arg;
    struct sm_merge_config cfg = { .layers = (const char *const *)t->layers,
                                   .n_layers = t->n_layers, .out = t->out,
                                   .limits = t->limits, .progress = p };

    return sm_merge(&cfg, &t->merge, e);
}

static int run_digest(void *arg, struct sm_image_progress *p, struct sm_image_error *e)
{
    struct task *t = arg;

    return sm_digest_file(t->path, t->kind, t->digest, p, e);
}

static int run_unpack(void *arg, struct sm_image_progress *p, struct sm_image_error *e)
{
    struct task *t = arg;
    struct sm_archive_config cfg = { .path = t->path, .out = t->out, .limits = t->limits,
                                     .progress = p };

    return sm_archive_unpack(&cfg, &t->archive, e);
}

static int run_pack(void *arg, struct sm_image_progress *p, struct sm_image_error *e)
{
    struct task *t = arg;

    return sm_archive_pack(t->path, t->out, &t->pack, p, e);
}

static void set_integer(lua_State *L, const char *key, uint64_t v)
{
    lua_pushinteger(L, (lua_Integer)v);
    lua_setfield(L, -2, key);
}

static void push_ingest(lua_State *L, const struct task *t)
{
    const struct sm_layer_result *r = &t->layer;

    lua_createtable(L, 0, 7);
    lua_pushstring(L, r->diff_id);
    lua_setfield(L, -2, "diff_id");
    lua_pushstring(L, r->format);
    lua_setfield(L, -2, "format");
    set_integer(L, "tar_bytes", r->tar_bytes);
    set_integer(L, "data_bytes", r->data_bytes);
    set_integer(L, "inodes", r->inodes);
    set_integer(L, "entries", r->entries);
    set_integer(L, "ignored", r->ignored);
}

static void push_extent(lua_State *L, uint64_t length)
{
    lua_createtable(L, 0, 3);
    lua_rotate(L, -2, 1);
    lua_setfield(L, -2, "path");
    set_integer(L, "offset", 0);
    set_integer(L, "length", length);
}

static void push_merge(lua_State *L, const struct task *t)
{
    const struct sm_merge_result *r = &t->merge;
    lua_Integer n = 1;

    lua_createtable(L, 0, 4);
    set_integer(L, "bytes", r->meta_bytes);
    set_integer(L, "size", r->device_bytes);
    set_integer(L, "inodes", r->inodes);
    lua_newtable(L);
    lua_pushstring(L, t->out);
    push_extent(L, r->meta_bytes);
    lua_rawseti(L, -2, n++);
    for (uint32_t i = 0; i < t->n_layers; i++) {
        if (!r->layer_bytes[i])
            continue;
        lua_pushfstring(L, "%s/data", t->layers[i]);
        push_extent(L, r->layer_bytes[i]);
        lua_rawseti(L, -2, n++);
    }
    lua_setfield(L, -2, "extents");
}

static void push_digest(lua_State *L, const struct task *t)
{
    lua_createtable(L, 0, 1);
    lua_pushstring(L, t->digest);
    lua_setfield(L, -2, "digest");
}

static void push_unpack(lua_State *L, const struct task *t)
{
    lua_createtable(L, (int)t->archive.count, 0);
    for (uint32_t i = 0; i < t->archive.count; i++) {
        const struct sm_archive_entry *entry = &t->archive.entries[i];

        lua_createtable(L, 0, 5);
        lua_pushstring(L, entry->name);
        lua_setfield(L, -2, "name");
        if (entry->link) {
            lua_pushstring(L, entry->link);
            lua_setfield(L, -2, "link");
        } else {
            lua_pushstring(L, entry->digest);
            lua_setfield(L, -2, "digest");
            lua_pushfstring(L, "%s/%d", t->out, (int)entry->file);
            lua_setfield(L, -2, "path");
            set_integer(L, "size", entry->bytes);
        }
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
}

static void push_pack(lua_State *L, const struct task *t)
{
    lua_createtable(L, 0, 4);
    lua_pushstring(L, t->pack.digest);
    lua_setfield(L, -2, "digest");
    set_integer(L, "size", t->pack.bytes);
    set_integer(L, "entries", t->pack.entries);
    set_integer(L, "skipped", t->pack.skipped);
}

/* Config tables, read into a task on the C stack that borrows its strings. */

static void read_limits(lua_State *L, struct sm_image_limits *l)
{
    static const char *const keys[] = { "bytes", "entries", "xattr_bytes", "depth", "ratio",
                                        NULL };

    if (lua_getfield(L, 1, "limits") != LUA_TNIL) {
        int at = lua_gettop(L);

        lua_image_check_table(L, at, keys);
        l->bytes = (uint64_t)lua_image_integer(L, at, "bytes", 0, 1, 1ll << 44);
        l->entries = (uint64_t)lua_image_integer(L, at, "entries", 0, 1, 1ll << 30);
        l->xattr_bytes = (uint64_t)lua_image_integer(L, at, "xattr_bytes", 0, 1, 1ll << 40);
        l->depth = (uint32_t)lua_image_integer(L, at, "depth", 0, 1, 4095);
        l->ratio = (uint32_t)lua_image_integer(L, at, "ratio", 0, 1, 1ll << 30);
    }
    lua_pop(L, 1);
}

static void read_layers(lua_State *L, struct task *t)
{
    if (lua_getfield(L, 1, "layers") != LUA_TTABLE)
        luaL_argerror(L, 1, "field 'layers': a list of directories expected");
    t->n_layers = (uint32_t)lua_rawlen(L, -1);
    luaL_argcheck(L, t->n_layers <= 4096, 1, "field 'layers' has more than 4096 entries");
    for (uint32_t i = 1; i <= t->n_layers; i++) {
        size_t len;
        const char *s = lua_rawgeti(L, -1, i) == LUA_TSTRING ? lua_tolstring(L, -1, &len) : NULL;

        if (!s || strlen(s) != len)
            luaL_argerror(L, 1, "field 'layers': a list of directories expected");
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
}

static int copy_string(char **to, const char *s)
{
    if (!s)
        return 0;
    *to = strdup(s);
    return *to ? 0 : -ENOMEM;
}

/* The checked list again: raw reads of strings, which cannot raise. */
static int copy_layers(lua_State *L, struct task *t)
{
    int ret = 0;

    t->layers = calloc(t->n_layers + 1u, sizeof(*t->layers));
    if (!t->layers)
        return -ENOMEM;
    lua_getfield(L, 1, "layers");
    for (uint32_t i = 0; ret == 0 && i < t->n_layers; i++) {
        lua_rawgeti(L, -1, (lua_Integer)i + 1);
        ret = copy_string(&t->layers[i], lua_tostring(L, -1));
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    return ret;
}

/* Starts the work described by model in a new userdata on top of the stack. */
static int start(lua_State *L, const struct task *model)
{
    struct box *b = lua_newuserdatauv(L, sizeof(*b), 0);
    struct task *t;
    int ret = 0;

    b->job = NULL;
    b->task = NULL;
    luaL_setmetatable(L, LUA_IMAGE_JOB);
    t = malloc(sizeof(*t));
    if (!t)
        return -ENOMEM;
    *t = *model;
    t->path = t->out = t->diff_id = NULL;
    b->task = t; /* freed with the userdata from here on */
    if (copy_string(&t->path, model->path) < 0 || copy_string(&t->out, model->out) < 0 ||
        copy_string(&t->diff_id, model->diff_id) < 0)
        return -ENOMEM;
    if (t->n_layers)
        ret = copy_layers(L, t);
    if (ret == 0)
        ret = sm_image_job_start(&b->job, t->run, t);
    return ret;
}

static int start_job(lua_State *L, const struct task *model)
{
    int ret = start(L, model);

    return ret < 0 ? lua_image_fail(L, strerror(-ret), ret) : 1;
}

static struct box *check_job(lua_State *L)
{
    struct box *b = luaL_checkudata(L, 1, LUA_IMAGE_JOB);

    if (!b->job)
        luaL_error(L, "attempt to use a closed job");
    return b;
}

static int job_result(lua_State *L)
{
    struct box *b = check_job(L);
    const struct sm_image_error *e;
    int ret = sm_image_job_wait(b->job, &e);

    if (ret < 0)
        return lua_image_fail(L, e->text, ret);
    b->task->push(L, b->task);
    return 1;
}

static int job_close(lua_State *L)
{
    struct box *b = luaL_checkudata(L, 1, LUA_IMAGE_JOB);

    if (b->job)
        sm_image_job_close(b->job);
    b->job = NULL;
    task_free(b->task);
    b->task = NULL;
    return 0;
}

static int job_pollfd(lua_State *L)
{
    lua_pushinteger(L, sm_image_job_fd(check_job(L)->job));
    return 1;
}

static int job_events(lua_State *L)
{
    check_job(L);
    lua_pushliteral(L, "r");
    return 1;
}

static int job_timeout(lua_State *L)
{
    check_job(L);
    lua_pushnil(L);
    return 1;
}

static int job_done(lua_State *L)
{
    lua_pushboolean(L, sm_image_job_done(check_job(L)->job));
    return 1;
}

static int job_progress(lua_State *L)
{
    struct sm_image_progress *p = sm_image_job_progress(check_job(L)->job);

    lua_pushinteger(L, (lua_Integer)atomic_load(&p->now_bytes));
    lua_pushinteger(L, (lua_Integer)atomic_load(&p->total_bytes));
    return 2;
}

static int job_cancel(lua_State *L)
{
    atomic_store(&sm_image_job_progress(check_job(L)->job)->cancel, true);
    return 0;
}

static int job_tostring(lua_State *L)
{
    struct box *b = luaL_checkudata(L, 1, LUA_IMAGE_JOB);

    if (b->job)
        lua_pushfstring(L, "image job (%p)", (void *)b);
    else
        lua_pushliteral(L, "image job (closed)");
    return 1;
}

static int core_ingest(lua_State *L)
{
    static const char *const keys[] = { "blob", "out", "diff_id", "media", "limits", NULL };
    struct task t = { .run = run_ingest, .push = push_ingest };

    lua_image_check_table(L, 1, keys);
    t.path = (char *)lua_image_string(L, 1, "blob", true);
    t.out = (char *)lua_image_string(L, 1, "out", true);
    t.diff_id = (char *)lua_image_string(L, 1, "diff_id", false);
    lua_image_string(L, 1, "media", false);
    read_limits(L, &t.limits);
    if (t.diff_id && sm_digest_parse(t.diff_id) == SM_DIGEST_NONE)
        return lua_image_fail(L, "diff_id: malformed digest", EINVAL);
    return start_job(L, &t);
}

static int core_digest(lua_State *L)
{
    static const char *const keys[] = { "file", "algorithm", NULL };
    struct task t = { .run = run_digest, .push = push_digest, .kind = SM_DIGEST_SHA256 };
    const char *algorithm;

    lua_image_check_table(L, 1, keys);
    t.path = (char *)lua_image_string(L, 1, "file", true);
    algorithm = lua_image_string(L, 1, "algorithm", false);
    if (algorithm && !strcmp(algorithm, "sha512"))
        t.kind = SM_DIGEST_SHA512;
    else if (algorithm && strcmp(algorithm, "sha256"))
        return luaL_argerror(L, 1, "field 'algorithm': 'sha256' or 'sha512' expected");
    return start_job(L, &t);
}

static int core_unpack_archive(lua_State *L)
{
    static const char *const keys[] = { "file", "out", "limits", NULL };
    struct task t = { .run = run_unpack, .push = push_unpack };

    lua_image_check_table(L, 1, keys);
    t.path = (char *)lua_image_string(L, 1, "file", true);
    t.out = (char *)lua_image_string(L, 1, "out", true);
    read_limits(L, &t.limits);
    return start_job(L, &t);
}

static int core_pack_folder(lua_State *L)
{
    static const char *const keys[] = { "dir", "out", NULL };
    struct task t = { .run = run_pack, .push = push_pack };

    lua_image_check_table(L, 1, keys);
    t.path = (char *)lua_image_string(L, 1, "dir", true);
    t.out = (char *)lua_image_string(L, 1, "out", true);
    return start_job(L, &t);
}

static int core_merge(lua_State *L)
{
    static const char *const keys[] = { "layers", "out", "limits", "async", NULL };
    struct task t = { .run = run_merge, .push = push_merge };
    bool async;
    int n;

    lua_image_check_table(L, 1, keys);
    t.out = (char *)lua_image_string(L, 1, "out", true);
    async = lua_image_boolean(L, 1, "async");
    read_limits(L, &t.limits);
    read_layers(L, &t);
    lua_settop(L, 1);
    n = start_job(L, &t);
    if (async || n != 1)
        return n;
    lua_replace(L, 1);
    n = job_result(L);
    job_close(L);
    return n;
}

static const luaL_Reg job_methods[] = {
    { "result", job_result },   { "pollfd", job_pollfd },     { "events", job_events },
    { "timeout", job_timeout }, { "done", job_done },         { "progress", job_progress },
    { "cancel", job_cancel },   { "close", job_close },       { NULL, NULL },
};

static const luaL_Reg job_meta[] = {
    { "__gc", job_close },
    { "__close", job_close },
    { "__tostring", job_tostring },
    { NULL, NULL },
};

static const luaL_Reg functions[] = {
    { "ingest", core_ingest },
    { "merge", core_merge },
    { "digest", core_digest },
    { "unpack_archive", core_unpack_archive },
    { "pack_folder", core_pack_folder },
    { NULL, NULL },
};

int lua_image_open_jobs(lua_State *L)
{
    luaL_newmetatable(L, LUA_IMAGE_JOB);
    luaL_setfuncs(L, job_meta, 0);
    luaL_newlib(L, job_methods);
    lua_setfield(L, -2, "__index");
    lua_pop(L, 1);
    luaL_setfuncs(L, functions, 0);
    return 0;
}
