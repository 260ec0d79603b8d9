/* SPDX-License-Identifier: Apache-2.0 */
/* Requests of proto.h, parsed into structs that own their memory. */
#ifndef SM_GUEST_REQUEST_H
#define SM_GUEST_REQUEST_H

#include "frame.h"

#define SM_CHAIN_MAX 64
#define SM_RLIMITS_MAX 16
#define SM_GROUPS_MAX 128
#define SM_MOUNTS_MAX 64
#define SM_NETS_MAX 8

struct sm_rlimit_set {
    uint32_t resource;
    uint64_t soft, hard;
};

struct sm_chain {
    uint16_t ids[SM_CHAIN_MAX];
    unsigned count;
};

struct sm_exec_req {
    char **argv, **env; /* NULL-terminated */
    size_t argc, envc;
    char *cwd, *user; /* NULL when not given */
    uint32_t flags, stop_signal;
    uint16_t rows, columns;
    uint32_t window[2];
    struct sm_rlimit_set rlimits[SM_RLIMITS_MAX];
    unsigned rlimit_count;
    uint32_t groups[SM_GROUPS_MAX];
    unsigned group_count;
    struct sm_chain chain;
};

struct sm_file_req {
    char *path;
    uint32_t mode, uid, gid, flags, window;
    bool has_mode, has_uid, has_gid;
    struct sm_chain chain;
};

struct sm_mount_req {
    char *type, *source, *target, *options;
};

struct sm_net_req {
    uint8_t mac[6];
    uint32_t mtu;
    char ip4[48], gw4[48], ip6[48], gw6[48]; /* "" when there is none */
};

struct sm_boot_req {
    uint32_t root, grace_ms, flags;
    bool has_grace, has_clock;
    uint64_t clock_ns;
    char *hostname, *hosts, *resolv, *machine_id;
    uint8_t *entropy;
    uint32_t entropy_len;
    struct sm_mount_req mounts[SM_MOUNTS_MAX];
    unsigned mount_count;
    struct sm_net_req nets[SM_NETS_MAX];
    unsigned net_count;
};

/*
 * 0, -EPROTO (malformed, unknown field, limit exceeded), -EINVAL (a value that
 * makes no sense) or -ENOMEM. Whatever is returned, *out may be freed.
 */
int sm_exec_parse(const uint8_t *data, size_t len, struct sm_exec_req *out);
int sm_file_parse(const uint8_t *data, size_t len, struct sm_file_req *out);
int sm_boot_parse(const uint8_t *data, size_t len, struct sm_boot_req *out);
void sm_exec_free(struct sm_exec_req *r);
void sm_file_free(struct sm_file_req *r);
void sm_boot_free(struct sm_boot_req *r);

#endif
