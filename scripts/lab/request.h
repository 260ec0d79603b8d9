/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a client asks labd to run: this header, then ngroups uint32 group ids,
 * then NUL-terminated strings: the working directory, argc arguments, envc
 * NAME=value pairs.
 */
#ifndef LAB_REQUEST_H
#define LAB_REQUEST_H

#include <stdint.h>

enum request_flags {
    REQ_TTY = 1,        /* a pty for stdin and stdout */
    REQ_TTY_STDERR = 2, /* and for stderr */
    REQ_NO_STDIN = 4,   /* nothing will come: stdin is /dev/null */
};

struct request {
    uint32_t flags;
    uint32_t uid, gid, ngroups, umask;
    uint16_t rows, columns;
    uint32_t argc, envc;
    uint64_t nofile_soft, nofile_hard;
};

#endif
