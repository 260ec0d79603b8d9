/* SPDX-License-Identifier: Apache-2.0 */
/*
 * device.add: what each type of device takes, and how it comes to be. Files
 * are opened here, before the guest runs and the worker confines itself.
 */
#include "cmd_call.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dev/disk.h"
#include "dev/fault.h"
#include "dev/vhost_net.h"
#include "dev/virtio_blk.h"
#include "dev/virtio_console.h"
#include "dev/virtio_net.h"
#include "dev/virtio_pmem.h"
#include "dev/virtio_rng.h"
#include "dev/virtio_vsock.h"
#include "tap.h"

#define TYPE { "type", SM_ARG_STRING, .required = true, .max = 16, .doc = "what to add" }
#define COUNT(table) (sizeof(table) / sizeof((table)[0]))

static const struct sm_arg_spec plain_args[] = { TYPE };

static const struct sm_arg_spec blk_args[] = {
    TYPE,
    { "serial", SM_ARG_STRING, .max = SM_BLK_SERIAL_BYTES, .doc = "what the guest knows it by" },
    { "readonly", SM_ARG_BOOL, .doc = "nothing is ever written" },
    { "extents", SM_ARG_ARRAY,
      .doc = "the base: a list of {path, offset, length}, one after the other; absent: zeros" },
    { "size", SM_ARG_SIZE, .max = SM_DISK_MAX_BYTES,
      .doc = "bytes; zeros follow the base; absent: what the base holds" },
    { "overlay", SM_ARG_STRING, .max = 4096,
      .doc = "path of the file that writes go to; absent: they go to the base" },
    { "ephemeral", SM_ARG_BOOL, .doc = "the overlay loses its name at once" },
    { "base_id", SM_ARG_STRING, .max = 127,
      .doc = "what the base is (a digest); an overlay made for another is refused" },
};

static const struct sm_arg_spec pmem_args[] = {
    TYPE,
    { "extents", SM_ARG_ARRAY, .required = true,
      .doc = "the segment, read-only: a list of {path, offset, length}, one after the other; "
             "2 MiB or a multiple of it in all" },
};

static const struct sm_arg_spec vsock_args[] = {
    TYPE,
    { "cid", SM_ARG_INT, .required = true, .min = 3, .max = UINT32_MAX - 1,
      .doc = "the guest's context id" },
    { "path", SM_ARG_STRING, .required = true, .max = 100,
      .doc = "unix socket to listen on; guest connections go to PATH_PORT" },
};

static const struct sm_arg_spec net_args[] = {
    TYPE,
    { "path", SM_ARG_STRING, .max = 107,
      .doc = "unix socket that takes frames: QEMU's stream format" },
    { "tap", SM_ARG_STRING, .max = SM_TAP_NAME_BYTES - 1,
      .doc = "in its place: a tap whose frames the host's kernel moves by itself (vhost-net)" },
    { "mac", SM_ARG_STRING, .required = true, .max = 17, .doc = "xx:xx:xx:xx:xx:xx, unicast" },
    { "mtu", SM_ARG_INT, .min = 68, .max = SM_NET_MAX_MTU,
      .doc = "told to the guest; 1500 when absent" },
    { "vnet", SM_ARG_BOOL, .doc = "each frame begins with a virtio_net_hdr: checksum offload" },
    { "tso", SM_ARG_BOOL, .doc = "with vnet: segmentation offload too" },
    { "queues", SM_ARG_INT, .min = 1, .max = SM_VIRTIO_NET_MAX_PAIRS,
      .doc = "pairs of queues, one for each CPU that sends; 1 when absent" },
};

static const struct sm_arg_spec extent_args[] = {
    { "path", SM_ARG_STRING, .max = 4096, .doc = "a file; absent: zeros, of `length`" },
    { "offset", SM_ARG_SIZE, .max = SM_DISK_MAX_BYTES, .doc = "where in it; 0 when absent" },
    { "length", SM_ARG_SIZE, .max = SM_DISK_MAX_BYTES,
      .doc = "bytes; to the end of the file when absent" },
};

static int failed(struct sm_call *call, const char *type, int err)
{
    const char *why = err == -ENOSPC ? "no more devices fit" : strerror(-err);
    return sm_call_fail(call, err, "%s: %s", type, why);
}

/* ---- what virtio devices have in common ---- */

/* The interrupt is the device's once it exists, ours until then. */
static int open_env(struct sm_call *call, const char *name, struct sm_io *io,
                    struct sm_virtio_env *env)
{
    struct sm_vm *vm = call->m->vm;
    *env = (struct sm_virtio_env){
        .mem = sm_vm_mem(vm),
        .io = io,
        .events = sm_vm_events(vm),
        .name = name,
        .trace = sm_vm_trace(vm),
    };
    return sm_vm_next_irq(vm, &env->irq);
}

static int attach(struct sm_call *call, const char *type, struct sm_virtio_env *env, int err,
                  struct sm_virtio_mmio *dev)
{
    if (err < 0) {
        sm_irq_close(&env->irq);
        return failed(call, type, err);
    }
    err = sm_vm_add_virtio(call->m->vm, dev);
    return err < 0 ? failed(call, type, err) : 0;
}

/* ---- types ---- */

static int add_serial(struct sm_call *call)
{
    int err = sm_vm_add_serial(call->m->vm);
    return err < 0 ? failed(call, "serial", err) : 0;
}

static int add_console(struct sm_call *call)
{
    struct sm_virtio_env env;
    struct sm_virtio_mmio *dev = NULL;
    int err = open_env(call, "console0", sm_vm_io(call->m->vm), &env);
    if (err < 0) {
        return failed(call, "console", err);
    }
    err = sm_virtio_console_create(&env, sm_vm_console(call->m->vm), &dev);
    return attach(call, "console", &env, err, dev);
}

static int add_rng(struct sm_call *call)
{
    struct sm_virtio_env env;
    struct sm_virtio_mmio *dev = NULL;
    int err = open_env(call, "rng0", sm_vm_io(call->m->vm), &env);
    if (err < 0) {
        return failed(call, "rng", err);
    }
    err = sm_virtio_rng_create(&env, &dev);
    return attach(call, "rng", &env, err, dev);
}

static int add_vsock(struct sm_call *call)
{
    struct sm_vsock_config cfg = {
        .guest_cid = sm_call_uint(call, "cid", 0),
        .path = sm_call_str(call, "path"),
    };
    struct sm_virtio_env env;
    struct sm_virtio_mmio *dev = NULL;
    int err = open_env(call, "vsock0", sm_vm_io(call->m->vm), &env);
    if (err < 0) {
        return failed(call, "vsock", err);
    }
    err = sm_virtio_vsock_create(&env, &cfg, &dev);
    return attach(call, "vsock", &env, err, dev);
}

static int parse_mac(const char *text, uint8_t mac[6])
{
    unsigned v[6];
    int end = 0;
    if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x%n", &v[0], &v[1], &v[2], &v[3], &v[4], &v[5],
               &end) != 6 || text[end] || strlen(text) != 17) {
        return -EINVAL;
    }
    for (unsigned i = 0; i < 6; i++) {
        mac[i] = (uint8_t)v[i];
    }
    return mac[0] & 1 ? -EINVAL : 0;
}

/* What a card is plugged into: a socket, or a tap by vhost. */
static int open_net(struct sm_call *call, unsigned pairs, struct sm_net **net)
{
    const char *path = sm_call_str(call, "path"), *tap = sm_call_str(call, "tap");
    bool vnet = sm_call_bool(call, "vnet", false), tso = sm_call_bool(call, "tso", false);
    char why[200] = "";
    int err;
    if (!path == !tap) {
        return sm_call_misuse(call, "path, tap: expected one of them");
    }
    if (tso && !vnet) {
        return sm_call_misuse(call, "tso: goes with vnet, and only with it");
    }
    if (tap) {
        err = sm_vhost_net_create(tap, pairs, net, why, sizeof(why));
        return err ? sm_call_fail(call, err, "net: %s", why[0] ? why : strerror(-err)) : 0;
    }
    err = sm_net_stream_connect(path, vnet, tso ? SM_NET_OFFLOAD_ALL : SM_NET_OFFLOAD_CSUM, net);
    return err ? sm_call_fail(call, err, "net: %s: %s", path, strerror(-err)) : 0;
}

/* Frames are copied in bulk, so each card has an I/O thread of its own. */
static int add_net(struct sm_call *call)
{
    struct sm_virtio_net_config cfg = {
        .mtu = (uint16_t)sm_call_uint(call, "mtu", 1500),
        .pairs = (unsigned)sm_call_uint(call, "queues", 1),
    };
    struct sm_virtio_env env;
    struct sm_virtio_mmio *dev = NULL;
    struct sm_io *io;
    char name[24];
    if (parse_mac(sm_call_str(call, "mac"), cfg.mac)) {
        return sm_call_misuse(call, "mac: expected xx:xx:xx:xx:xx:xx of one card");
    }
    int err = open_net(call, cfg.pairs, &cfg.net);
    if (err) {
        return err;
    }
    snprintf(name, sizeof(name), "net%u", call->m->nets);
    err = sm_vm_io_new(call->m->vm, name, &io);
    if (!err) {
        err = open_env(call, name, io, &env);
    }
    if (err < 0) {
        cfg.net->ops->destroy(cfg.net);
        return failed(call, "net", err);
    }
    err = sm_virtio_net_create(&env, &cfg, &dev);
    if (err < 0) {
        cfg.net->ops->destroy(cfg.net);
    } else {
        call->m->nets++;
    }
    return attach(call, "net", &env, err, dev);
}

/* ---- blk ---- */

static void free_extents(struct sm_disk_extent *extents, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        free((char *)extents[i].path);
    }
    free(extents);
}

static int parse_extent(struct sm_call *call, struct sm_msg_reader *r, unsigned n,
                        struct sm_disk_extent *extent)
{
    struct sm_arg args[SM_CMD_MAX_ARGS];
    char where[32];
    snprintf(where, sizeof(where), "extents[%u].", n + 1);
    int err = sm_call_parse(call, *r, where, extent_args, COUNT(extent_args), args);
    if (err) {
        return err;
    }
    if (!args[0].given && !args[2].given) {
        sm_call_free_args(extent_args, COUNT(extent_args), args);
        return sm_call_misuse(call, "%spath: missing, and no length of zeros", where);
    }
    *extent = (struct sm_disk_extent){
        .path = args[0].given ? args[0].v.s : NULL, /* now the extent's */
        .fd = -1,
        .offset = args[1].given ? args[1].v.u : 0,
        .length_bytes = args[2].given ? args[2].v.u : 0,
    };
    return sm_msg_skip(r);
}

static int parse_extents(struct sm_call *call, struct sm_disk_extent **out, unsigned *count)
{
    struct sm_msg_reader r = sm_call_arg(call, "extents")->v.value;
    struct sm_msg_value head = { .u.count = 0 };
    if (sm_call_arg(call, "extents")->given) {
        sm_msg_next(&r, &head);
    }
    if (head.u.count > SM_DISK_MAX_EXTENTS) {
        return sm_call_misuse(call, "extents: expected at most %d", SM_DISK_MAX_EXTENTS);
    }
    struct sm_disk_extent *extents = calloc(head.u.count + 1, sizeof(*extents));
    if (!extents) {
        return sm_call_fail(call, -ENOMEM, "out of memory");
    }
    int err = 0;
    unsigned n = 0;
    while (n < head.u.count && !err) {
        err = parse_extent(call, &r, n, &extents[n]);
        n += !err;
    }
    if (err) {
        free_extents(extents, n);
        return err;
    }
    *out = extents;
    *count = n;
    return 0;
}

static int check_blk(struct sm_call *call)
{
    bool readonly = sm_call_bool(call, "readonly", false);
    const char *overlay = sm_call_str(call, "overlay");
    if (readonly && overlay) {
        return sm_call_misuse(call, "overlay: not with readonly");
    }
    if (!overlay && sm_call_bool(call, "ephemeral", false)) {
        return sm_call_misuse(call, "ephemeral: goes with overlay, and only with it");
    }
    return 0;
}

static int open_disk(struct sm_call *call, struct sm_disk **disk)
{
    struct sm_disk_extent *extents = NULL;
    unsigned count = 0;
    int err = check_blk(call);
    if (!err) {
        err = parse_extents(call, &extents, &count);
    }
    if (err) {
        return err;
    }
    const char *overlay = sm_call_str(call, "overlay");
    struct sm_disk_config cfg = {
        .mode = sm_call_bool(call, "readonly", false) ? SM_DISK_READ_ONLY
                : overlay                             ? SM_DISK_OVERLAY
                                                      : SM_DISK_DIRECT,
        .extents = extents,
        .extent_count = count,
        .size_bytes = sm_call_uint(call, "size", 0),
        .overlay = overlay,
        .ephemeral = sm_call_bool(call, "ephemeral", false),
        .base_id = sm_call_str(call, "base_id"),
    };
    char why[200] = "";
    err = sm_disk_open(&cfg, disk, why, sizeof(why));
    free_extents(extents, count);
    return err < 0 ? sm_call_fail(call, err, "blk: %s", why[0] ? why : strerror(-err)) : 0;
}

/* The rules of faults of the disk that comes next. */
static int new_faults(struct sm_machine *m, struct sm_faults **out)
{
    *out = NULL;
    if (m->disks >= SM_CMD_FAULTY_DISKS || m->faults[m->disks]) {
        *out = m->disks < SM_CMD_FAULTY_DISKS ? m->faults[m->disks] : NULL;
        return 0;
    }
    *out = malloc(sizeof(**out));
    if (!*out) {
        return -ENOMEM;
    }
    sm_faults_init(*out);
    m->faults[m->disks] = *out; /* the machine's from here on */
    return 0;
}

/* A disk blocks, so each has an I/O thread of its own. */
static int add_disk(struct sm_call *call, struct sm_disk *disk)
{
    struct sm_vm *vm = call->m->vm;
    struct sm_blk_config cfg = { .serial = sm_call_str(call, "serial"), .disk = disk };
    struct sm_virtio_env env;
    struct sm_virtio_mmio *dev = NULL;
    struct sm_io *io;
    char name[24];
    snprintf(name, sizeof(name), "blk%u", call->m->disks);
    int err = new_faults(call->m, &cfg.faults);
    if (!err) {
        err = sm_vm_io_new(vm, name, &io);
    }
    if (!err) {
        err = open_env(call, name, io, &env);
    }
    if (err < 0) {
        sm_disk_close(disk);
        return failed(call, "blk", err);
    }
    err = sm_virtio_blk_create(&env, &cfg, &dev);
    if (err < 0) {
        sm_disk_close(disk);
    } else {
        call->m->disks++;
    }
    return attach(call, "blk", &env, err, dev);
}

static int add_blk(struct sm_call *call)
{
    struct sm_disk *disk;
    int err = open_disk(call, &disk);
    return err ? err : add_disk(call, disk);
}

/* ---- pmem ---- */

static int add_pmem(struct sm_call *call)
{
    struct sm_pmem_config cfg = { 0 };
    struct sm_disk_extent *extents = NULL;
    struct sm_virtio_env env;
    struct sm_virtio_mmio *dev = NULL;
    char why[200] = "";
    int err = parse_extents(call, &extents, &cfg.extent_count);
    if (err) {
        return err;
    }
    err = open_env(call, "pmem0", sm_vm_io(call->m->vm), &env);
    if (err < 0) {
        free_extents(extents, cfg.extent_count);
        return failed(call, "pmem", err);
    }
    cfg.extents = extents;
    err = sm_virtio_pmem_create(&env, &cfg, &dev, why, sizeof(why));
    free_extents(extents, cfg.extent_count);
    if (err < 0) {
        sm_irq_close(&env.irq);
        return sm_call_fail(call, err, "pmem: %s", why[0] ? why : strerror(-err));
    }
    return attach(call, "pmem", &env, 0, dev);
}

#define VARIANT(type, table, run) { type, table, COUNT(table), run }

const struct sm_cmd_variant sm_cmd_devices[] = {
    VARIANT("serial", plain_args, add_serial),
    VARIANT("console", plain_args, add_console),
    VARIANT("rng", plain_args, add_rng),
    VARIANT("vsock", vsock_args, add_vsock),
    VARIANT("blk", blk_args, add_blk),
    VARIANT("net", net_args, add_net),
    VARIANT("pmem", pmem_args, add_pmem),
    { NULL, NULL, 0, NULL },
};
