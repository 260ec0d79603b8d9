/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The arguments of a command: held against what the table says of them, in
 * this one place. Every error names the command, the key and what was expected.
 */
#include "cmd_call.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int fail(struct sm_call *call, int code, bool misuse, const char *fmt, va_list ap)
{
    struct sm_cmd_error *err = call->err;
    int n = snprintf(err->text, sizeof(err->text), "%s: ", call->cmd->name);
    vsnprintf(err->text + n, sizeof(err->text) - (size_t)n, fmt, ap);
    err->code = code;
    err->misuse = misuse;
    return code;
}

int sm_call_fail(struct sm_call *call, int code, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fail(call, code, false, fmt, ap);
    va_end(ap);
    return code;
}

int sm_call_misuse(struct sm_call *call, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fail(call, -EINVAL, true, fmt, ap);
    va_end(ap);
    return -EINVAL;
}

const struct sm_arg *sm_call_arg(const struct sm_call *call, const char *key)
{
    for (unsigned i = 0; i < call->count; i++) {
        if (strcmp(call->specs[i].key, key) == 0) {
            return &call->args[i];
        }
    }
    assert(!"a handler asks for an argument its table does not have");
    return NULL;
}

uint64_t sm_call_uint(const struct sm_call *call, const char *key, uint64_t absent)
{
    const struct sm_arg *arg = sm_call_arg(call, key);
    return arg->given ? arg->v.u : absent;
}

bool sm_call_bool(const struct sm_call *call, const char *key, bool absent)
{
    const struct sm_arg *arg = sm_call_arg(call, key);
    return arg->given ? arg->v.b : absent;
}

const char *sm_call_str(const struct sm_call *call, const char *key)
{
    const struct sm_arg *arg = sm_call_arg(call, key);
    return arg->given ? arg->v.s : NULL;
}

/* ---- what was expected, what was got ---- */

static void expected(const struct sm_arg_spec *spec, char *buf, size_t len)
{
    switch (spec->type) {
    case SM_ARG_BOOL: snprintf(buf, len, "true or false"); return;
    case SM_ARG_INT:
        snprintf(buf, len, "an integer from %" PRIu64 " to %" PRIu64, spec->min, spec->max);
        return;
    case SM_ARG_U64: snprintf(buf, len, "an integer"); return;
    case SM_ARG_NUMBER: snprintf(buf, len, "a number"); return;
    case SM_ARG_SIZE:
        snprintf(buf, len, "a size in bytes (or like \"512M\") from %" PRIu64 " to %" PRIu64,
                 spec->min, spec->max);
        return;
    case SM_ARG_STRING:
        if (spec->max) {
            snprintf(buf, len, "a string of at most %" PRIu64 " bytes, without NUL", spec->max);
        } else {
            snprintf(buf, len, "a string without NUL");
        }
        return;
    case SM_ARG_BYTES: snprintf(buf, len, "a string of at most %" PRIu64 " bytes", spec->max); return;
    case SM_ARG_CHOICE: snprintf(buf, len, "one of %s", spec->choices); return;
    case SM_ARG_ARRAY: snprintf(buf, len, "a list"); return;
    case SM_ARG_MAP: snprintf(buf, len, "a table"); return;
    }
}

static void got(const struct sm_msg_value *v, char *buf, size_t len)
{
    switch (v->type) {
    case SM_MSG_NIL: snprintf(buf, len, "nil"); return;
    case SM_MSG_BOOL: snprintf(buf, len, "%s", v->u.b ? "true" : "false"); return;
    case SM_MSG_INT: snprintf(buf, len, "%" PRId64, v->u.i); return;
    case SM_MSG_UINT: snprintf(buf, len, "%" PRIu64, v->u.u); return;
    case SM_MSG_DOUBLE: snprintf(buf, len, "%g", v->u.d); return;
    case SM_MSG_BYTES:
        if (v->u.bytes.len <= 40 && !memchr(v->u.bytes.p, 0, v->u.bytes.len)) {
            snprintf(buf, len, "'%.*s'", (int)v->u.bytes.len, v->u.bytes.p);
        } else {
            snprintf(buf, len, "a string of %zu bytes", v->u.bytes.len);
        }
        return;
    case SM_MSG_ARRAY: snprintf(buf, len, "a list"); return;
    case SM_MSG_MAP: snprintf(buf, len, "a table"); return;
    }
}

static int wrong(struct sm_call *call, const char *where, const struct sm_arg_spec *spec,
                 const struct sm_msg_value *v)
{
    char want[160], have[64];
    expected(spec, want, sizeof(want));
    got(v, have, sizeof(have));
    return sm_call_misuse(call, "%s%s: expected %s, got %s", where, spec->key, want, have);
}

/* ---- values ---- */

/* An integer, or a double that is one. wraps: negative ones are wanted. */
static bool to_u64(const struct sm_msg_value *v, bool wraps, uint64_t *out)
{
    int64_t i;
    if (v->type == SM_MSG_UINT) {
        *out = v->u.u;
        return true;
    }
    if (v->type == SM_MSG_INT) {
        i = v->u.i;
    } else if (v->type == SM_MSG_DOUBLE && v->u.d >= -0x1p63 && v->u.d < 0x1p63 &&
               v->u.d == floor(v->u.d)) {
        i = (int64_t)v->u.d;
    } else {
        return false;
    }
    *out = (uint64_t)i;
    return wraps || i >= 0;
}

/* "512M" */
static bool to_size(const struct sm_msg_value *v, uint64_t *out)
{
    if (v->type != SM_MSG_BYTES) {
        return to_u64(v, false, out);
    }
    const char *p = v->u.bytes.p, *end = p + v->u.bytes.len;
    uint64_t n = 0;
    if (p == end || *p < '0' || *p > '9') {
        return false;
    }
    for (; p < end && *p >= '0' && *p <= '9'; p++) {
        if (n > (UINT64_MAX >> 4) / 10) {
            return false;
        }
        n = n * 10 + (uint64_t)(*p - '0');
    }
    if (p < end) {
        const char *units = "kKmMgGtT", *unit = strchr(units, *p);
        if (!*p || !unit || ++p != end) {
            return false;
        }
        unsigned shift = 10u * (unsigned)((unit - units) / 2 + 1);
        if (n > UINT64_MAX >> shift) {
            return false;
        }
        n <<= shift;
    }
    *out = n;
    return true;
}

static bool to_choice(const struct sm_msg_value *v, const char *choices, uint64_t *out)
{
    if (v->type != SM_MSG_BYTES || !v->u.bytes.len ||
        memchr(v->u.bytes.p, '|', v->u.bytes.len)) {
        return false;
    }
    for (uint64_t n = 0; *choices; n++) {
        size_t len = strcspn(choices, "|");
        if (len == v->u.bytes.len && memcmp(choices, v->u.bytes.p, len) == 0) {
            *out = n;
            return true;
        }
        choices += len + (choices[len] == '|');
    }
    return false;
}

static bool to_string(const struct sm_msg_value *v, uint64_t max, char **out)
{
    if (v->type != SM_MSG_BYTES || (max && v->u.bytes.len > max) ||
        memchr(v->u.bytes.p, 0, v->u.bytes.len)) {
        return false;
    }
    *out = malloc(v->u.bytes.len + 1);
    if (*out) {
        memcpy(*out, v->u.bytes.p, v->u.bytes.len);
        (*out)[v->u.bytes.len] = 0;
    }
    return true;
}

static bool in_range(const struct sm_arg_spec *spec, uint64_t v)
{
    return v >= spec->min && v <= spec->max;
}

/* start: the reader at the value v. Whether the value fits the spec. */
static bool convert(const struct sm_arg_spec *spec, struct sm_msg_reader start,
                    const struct sm_msg_value *v, struct sm_arg *arg)
{
    bool empty_map = v->type == SM_MSG_MAP && v->u.count == 0;
    switch (spec->type) {
    case SM_ARG_BOOL:
        arg->v.b = v->u.b;
        return v->type == SM_MSG_BOOL;
    case SM_ARG_INT: return to_u64(v, false, &arg->v.u) && in_range(spec, arg->v.u);
    case SM_ARG_U64: return to_u64(v, true, &arg->v.u);
    case SM_ARG_NUMBER: /* an integer below zero stays one: no range is checked here */
        arg->v.d = v->type == SM_MSG_DOUBLE ? v->u.d : v->type == SM_MSG_INT ? (double)v->u.i : NAN;
        return v->type == SM_MSG_DOUBLE || v->type == SM_MSG_INT;
    case SM_ARG_SIZE: return to_size(v, &arg->v.u) && in_range(spec, arg->v.u);
    case SM_ARG_STRING: return to_string(v, spec->max, &arg->v.s);
    case SM_ARG_BYTES:
        arg->v.bytes.p = v->u.bytes.p;
        arg->v.bytes.len = v->u.bytes.len;
        return v->type == SM_MSG_BYTES && v->u.bytes.len <= spec->max;
    case SM_ARG_CHOICE: return to_choice(v, spec->choices, &arg->v.u);
    case SM_ARG_ARRAY: /* an empty Lua table is an empty map */
        arg->v.value = start;
        return v->type == SM_MSG_ARRAY || empty_map;
    case SM_ARG_MAP:
        arg->v.value = start;
        return v->type == SM_MSG_MAP;
    }
    return false;
}

/* ---- the map of arguments ---- */

static int unknown_key(struct sm_call *call, const char *where, const struct sm_msg_value *key,
                       const struct sm_arg_spec *specs, unsigned count)
{
    char have[64], known[128] = "none";
    size_t n = 0;
    got(key, have, sizeof(have));
    for (unsigned i = 0; i < count && n < sizeof(known); i++) {
        n += (size_t)snprintf(known + n, sizeof(known) - n, "%s%s", i ? ", " : "",
                              specs[i].key);
    }
    return sm_call_misuse(call, "%sunknown key %s (known: %s)", where, have, known);
}

static int parse_pair(struct sm_call *call, struct sm_msg_reader *r, const char *where,
                      const struct sm_arg_spec *specs, unsigned count, struct sm_arg *args)
{
    struct sm_msg_value key, v;
    struct sm_msg_reader start = *r;
    if (sm_msg_next(r, &key) < 0) {
        return sm_call_misuse(call, "malformed arguments");
    }
    unsigned i = 0;
    while (i < count && !sm_msg_is(&key, specs[i].key)) {
        i++;
    }
    if (i == count) {
        return unknown_key(call, where, &key, specs, count);
    }
    start = *r;
    struct sm_msg_reader head = *r;
    if (sm_msg_next(&head, &v) < 0 || sm_msg_skip(r) < 0) {
        return sm_call_misuse(call, "malformed arguments");
    }
    if (v.type == SM_MSG_NIL) {
        return 0; /* as if absent */
    }
    if (args[i].given) {
        return sm_call_misuse(call, "%s%s: given twice", where, specs[i].key);
    }
    if (!convert(&specs[i], start, &v, &args[i])) {
        return wrong(call, where, &specs[i], &v);
    }
    args[i].given = true;
    if (specs[i].type == SM_ARG_STRING && !args[i].v.s) {
        return sm_call_fail(call, -ENOMEM, "out of memory");
    }
    return 0;
}

int sm_call_parse(struct sm_call *call, struct sm_msg_reader map, const char *where,
                  const struct sm_arg_spec *specs, unsigned count, struct sm_arg *args)
{
    assert(count <= SM_CMD_MAX_ARGS);
    memset(args, 0, sizeof(*args) * SM_CMD_MAX_ARGS);
    struct sm_msg_value head;
    if (sm_msg_next(&map, &head) < 0 || (head.type != SM_MSG_MAP && head.type != SM_MSG_NIL)) {
        return sm_call_misuse(call, "%sexpected a table of arguments", where);
    }
    int err = 0;
    for (uint32_t n = head.type == SM_MSG_MAP ? head.u.count : 0; n && !err; n--) {
        err = parse_pair(call, &map, where, specs, count, args);
    }
    for (unsigned i = 0; i < count && !err; i++) {
        if (specs[i].required && !args[i].given) {
            char want[160];
            expected(&specs[i], want, sizeof(want));
            err = sm_call_misuse(call, "%s%s: missing (%s; %s)", where, specs[i].key,
                                 specs[i].doc, want);
        }
    }
    if (err) {
        sm_call_free_args(specs, count, args);
    }
    return err;
}

void sm_call_free_args(const struct sm_arg_spec *specs, unsigned count, struct sm_arg *args)
{
    for (unsigned i = 0; i < count; i++) {
        if (specs[i].type == SM_ARG_STRING && args[i].given) {
            free(args[i].v.s);
        }
        args[i].given = false;
    }
}
