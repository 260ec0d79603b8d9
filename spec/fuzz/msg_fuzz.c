/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The message reader on hostile bytes: what sm_msg_check accepts can be walked
 * to its end and written again to a message of equal meaning; what it refuses
 * is refused without a read outside the buffer (ASan sees to that).
 */
#include <stdlib.h>
#include <string.h>

#include "msg.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Copy one value; the recursion is bounded by sm_msg_check. */
static void copy_value(struct sm_msg_reader *r, struct sm_msg_writer *w)
{
    struct sm_msg_value v;
    if (sm_msg_next(r, &v) < 0) {
        abort();
    }
    switch (v.type) {
    case SM_MSG_NIL: sm_msg_put_nil(w); return;
    case SM_MSG_BOOL: sm_msg_put_bool(w, v.u.b); return;
    case SM_MSG_INT: sm_msg_put_int(w, v.u.i); return;
    case SM_MSG_UINT: sm_msg_put_uint(w, v.u.u); return;
    case SM_MSG_DOUBLE: sm_msg_put_double(w, v.u.d); return;
    case SM_MSG_BYTES: sm_msg_put_strn(w, v.u.bytes.p, v.u.bytes.len); return;
    case SM_MSG_ARRAY: sm_msg_put_array(w, v.u.count); break;
    case SM_MSG_MAP: sm_msg_put_map(w, v.u.count); break;
    }
    uint64_t n = v.type == SM_MSG_MAP ? 2ull * v.u.count : v.u.count;
    while (n--) {
        copy_value(r, w);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sm_msg_reader r, at;
    sm_msg_reader_init(&r, data, size);
    int found = sm_msg_find(&r, "type", &at);
    if (sm_msg_check(data, size) < 0) {
        return 0;
    }
    if (found == 0 && sm_msg_skip(&at) < 0) {
        abort();
    }
    struct sm_msg_writer first, second;
    sm_msg_writer_init(&first, 16 * size + 64);
    sm_msg_writer_init(&second, 16 * size + 64);
    copy_value(&r, &first);
    if (first.error || sm_msg_check(first.buf, first.len) < 0) {
        abort();
    }
    /* written once, it is in its shortest form: a second copy is the same */
    sm_msg_reader_init(&r, first.buf, first.len);
    copy_value(&r, &second);
    if (second.len != first.len || memcmp(first.buf, second.buf, first.len) != 0) {
        abort();
    }
    sm_msg_writer_free(&first);
    sm_msg_writer_free(&second);
    return 0;
}
