/* SPDX-License-Identifier: Apache-2.0 */
/* The requests of sm-net; see control.h. The parent is trusted, and checked
 * all the same: its mistakes are told in one line. */
#include "control.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "confine.h"
#include "tap.h"

#define STAT_FLOWS 256

__attribute__((format(printf, 3, 4))) static int fail(struct sm_control *c, int code,
                                                      const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    vsnprintf(c->err, sizeof(c->err), fmt, args);
    va_end(args);
    return code;
}

/* ---- arguments ---- */

static bool get(const struct sm_msg_reader *args, const char *key, struct sm_msg_value *v)
{
    struct sm_msg_reader at;

    return sm_msg_find(args, key, &at) == 0 && sm_msg_next(&at, v) == 0;
}

static int64_t get_int(const struct sm_msg_reader *args, const char *key, int64_t absent)
{
    struct sm_msg_value v;

    return get(args, key, &v) && v.type == SM_MSG_INT ? v.u.i : absent;
}

static bool get_bool(const struct sm_msg_reader *args, const char *key)
{
    struct sm_msg_value v;

    return get(args, key, &v) && v.type == SM_MSG_BOOL && v.u.b;
}

/* The text, or "" when there is none. */
static const char *get_text(const struct sm_msg_reader *args, const char *key, char *buf, size_t size)
{
    struct sm_msg_value v;

    buf[0] = 0;
    if (get(args, key, &v) && v.type == SM_MSG_BYTES && v.u.bytes.len < size) {
        memcpy(buf, v.u.bytes.p, v.u.bytes.len);
        buf[v.u.bytes.len] = 0;
    }
    return buf;
}

static int each_text(struct sm_control *c, const struct sm_msg_reader *args, const char *key,
                     int (*fn)(struct sm_control *, struct sm_nic *, const char *), struct sm_nic *nic)
{
    struct sm_msg_reader at;
    struct sm_msg_value head, v;
    char buf[512];

    if (sm_msg_find(args, key, &at) || sm_msg_next(&at, &head) || head.type != SM_MSG_ARRAY)
        return 0;
    for (uint32_t i = 0; i < head.u.count; i++) {
        int err;

        if (sm_msg_next(&at, &v) || v.type != SM_MSG_BYTES || v.u.bytes.len >= sizeof(buf))
            return fail(c, -EINVAL, "%s: expected a list of text", key);
        memcpy(buf, v.u.bytes.p, v.u.bytes.len);
        buf[v.u.bytes.len] = 0;
        err = fn(c, nic, buf);
        if (err)
            return err;
    }
    return 0;
}

static struct sm_nic *get_nic(struct sm_control *c, const struct sm_msg_reader *args)
{
    int64_t i = get_int(args, "nic", -1);

    if (i < 0 || i >= SM_CONTROL_NICS || !c->nics[i]) {
        fail(c, -ENOENT, "no such card");
        return NULL;
    }
    return c->nics[i];
}

static int index_of(const struct sm_control *c, const struct sm_nic *nic)
{
    for (int i = 0; i < SM_CONTROL_NICS; i++)
        if (c->nics[i] == nic)
            return i;
    return -1;
}

/* ---- net.open ---- */

static int add_allow(struct sm_control *c, struct sm_nic *nic, const char *text)
{
    const char *why;
    int err = sm_policy_add_rule(&nic->policy, true, text, &why);

    return err ? fail(c, err, "allow '%s': %s", text, why) : 0;
}

static int add_deny(struct sm_control *c, struct sm_nic *nic, const char *text)
{
    const char *why;
    int err = sm_policy_add_rule(&nic->policy, false, text, &why);

    return err ? fail(c, err, "deny '%s': %s", text, why) : 0;
}

static int add_server(struct sm_control *c, struct sm_nic *nic, const char *text)
{
    int err = sm_resolver_add_server(&nic->resolver, text);

    if (err == -ENOSPC)
        return 0; /* the first ones are enough */
    return err ? fail(c, err, "dns '%s': expected ADDRESS or ADDRESS:PORT", text) : 0;
}

static int get_addr(struct sm_control *c, const struct sm_msg_reader *args, const char *key,
                    struct sm_addr *out)
{
    char buf[64];

    if (!get_text(args, key, buf, sizeof(buf))[0])
        return 0;
    return sm_addr_parse(buf, out) ? 0 : fail(c, -EINVAL, "%s: '%s' is no address", key, buf);
}

static void mask(struct sm_addr *a, unsigned prefix)
{
    for (unsigned i = 0; i < 16; i++) {
        unsigned keep = prefix > i * 8 ? prefix - i * 8 : 0;

        a->b[i] &= (uint8_t)(keep >= 8 ? 0xff : ~(0xffu >> keep));
    }
}

static int get_mac(struct sm_control *c, const struct sm_msg_reader *args, uint8_t mac[6])
{
    char buf[32];
    unsigned v[6];

    if (sscanf(get_text(args, "mac", buf, sizeof(buf)), "%2x:%2x:%2x:%2x:%2x:%2x", &v[0], &v[1],
               &v[2], &v[3], &v[4], &v[5]) != 6)
        return fail(c, -EINVAL, "mac: '%s' is no MAC address", buf);
    for (unsigned i = 0; i < 6; i++)
        mac[i] = (uint8_t)v[i];
    return 0;
}

/* What the host itself is known by; a guest behind it could reach its services
 * there as if on loopback. */
static void find_own(struct sm_policy *p)
{
    struct ifaddrs *all, *i;

    if (getifaddrs(&all) < 0)
        return;
    for (i = all; i && p->own_count < sizeof(p->own) / sizeof(p->own[0]); i = i->ifa_next) {
        struct sm_addr a = { 0 };

        if (!i->ifa_addr)
            continue;
        if (i->ifa_addr->sa_family == AF_INET) {
            a.family = 4;
            memcpy(a.b, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, 4);
        } else if (i->ifa_addr->sa_family == AF_INET6) {
            a.family = 6;
            memcpy(a.b, &((struct sockaddr_in6 *)i->ifa_addr)->sin6_addr, 16);
        }
        if (a.family)
            p->own[p->own_count++] = a;
    }
    freeifaddrs(all);
}

static int get_policy(struct sm_control *c, const struct sm_msg_reader *args, struct sm_nic *nic)
{
    struct sm_policy *p = &nic->policy;
    char buf[32];
    int err = get_mac(c, args, p->mac);

    err = err ? err : get_addr(c, args, "ip4", &p->ip4);
    err = err ? err : get_addr(c, args, "ip6", &p->ip6);
    err = err ? err : get_addr(c, args, "gw4", &p->gw4);
    err = err ? err : get_addr(c, args, "gw6", &p->gw6);
    err = err ? err : get_addr(c, args, "dns4", &p->dns4);
    err = err ? err : get_addr(c, args, "dns6", &p->dns6);
    if (err)
        return err;
    p->prefix4 = (unsigned)get_int(args, "prefix4", 0);
    p->prefix6 = (unsigned)get_int(args, "prefix6", 0);
    if (p->prefix4 > 32 || p->prefix6 > 128)
        return fail(c, -EINVAL, "prefix: out of range");
    get_text(args, "default", buf, sizeof(buf));
    p->fallback = !strcmp(buf, "allow_all") ? SM_DEFAULT_ALLOW_ALL
                  : !strcmp(buf, "deny")    ? SM_DEFAULT_DENY
                                            : SM_DEFAULT_DENY_PRIVATE;
    p->ask = get_bool(args, "ask");
    err = each_text(c, args, "allow", add_allow, nic);
    err = err ? err : each_text(c, args, "deny", add_deny, nic);
    return err ? err : each_text(c, args, "servers", add_server, nic);
}

static int plug_user(struct sm_control *c, struct sm_nic *nic)
{
    struct sm_policy *p = &nic->policy;
    int err;

    p->dhcp = true;
    p->subnet4 = p->ip4;
    p->subnet6 = p->ip6;
    mask(&p->subnet4, p->prefix4);
    mask(&p->subnet6, p->prefix6);
    err = sm_user_create(nic, &nic->backend);
    return err ? fail(c, err, "user: %s", strerror(-err)) : 0;
}

static int plug_tap(struct sm_control *c, struct sm_nic *nic, char name[16])
{
    int err = sm_tap_create(nic, name, &nic->backend);

    nic->policy.link = true;
    /* The gateway is another machine here, not our stand-in for the host. */
    nic->policy.gw4.family = nic->policy.gw6.family = 0;
    return err ? fail(c, err, "tap %s: %s", name, sm_tap_why(err, false)) : 0;
}

static int plug_wire(struct sm_control *c, struct sm_nic *nic, const char *peer)
{
    int err = sm_wire_create(nic, peer, &nic->backend);

    nic->policy.link = true;
    nic->policy.gw4.family = nic->policy.gw6.family = 0;
    return err ? fail(c, err, "unix %s: %s", peer, strerror(-err)) : 0;
}

static int plug_hub(struct sm_control *c, struct sm_nic *nic)
{
    int err = c->hub ? 0 : sm_hub_create(&c->hub);

    nic->policy.link = true;
    err = err ? err : sm_hub_plug(c->hub, nic, &nic->backend);
    return err ? fail(c, err, "switch: %s", err == -ENOSPC ? "every port is taken" : strerror(-err)) : 0;
}

static int open_nic(struct sm_control *c, const struct sm_msg_reader *args, struct sm_nic *nic,
                    char tap[16])
{
    char type[16], peer[256], capture[512];
    int err = get_policy(c, args, nic);
    struct sm_pcap *pcap;
    uint32_t id;

    if (err)
        return err;
    nic->mtu = (unsigned)get_int(args, "mtu", 1500);
    if (nic->mtu < 576 || nic->mtu > SM_NET_MAX_MTU)
        return fail(c, -EINVAL, "mtu: expected 576 to %d", SM_NET_MAX_MTU);
    nic->vnet = true;
    nic->rate_bytes = (uint64_t)get_int(args, "rate_bytes", 0);
    nic->rate_packets = (uint64_t)get_int(args, "rate_packets", 0);
    nic->event = c->event;
    nic->arg = c->event_arg;
    find_own(&nic->policy);
    get_text(args, "pcap", capture, sizeof(capture));
    err = capture[0] ? sm_pcap_open(capture, &pcap) : 0;
    err = err || !capture[0] ? err : sm_captures_add(&nic->captures, pcap, &id);
    if (err)
        return fail(c, err, "pcap %s: %s", capture, strerror(-err));
    get_text(args, "type", type, sizeof(type));
    if (!strcmp(type, "user"))
        return plug_user(c, nic);
    if (!strcmp(type, "tap"))
        return plug_tap(c, nic, tap);
    if (!strcmp(type, "unix"))
        return plug_wire(c, nic, get_text(args, "peer", peer, sizeof(peer)));
    if (!strcmp(type, "switch"))
        return plug_hub(c, nic);
    return fail(c, -EINVAL, "type: expected user, tap, unix or switch");
}

static int net_open(struct sm_control *c, const struct sm_msg_reader *args)
{
    char path[108], tap[16] = "", name[24];
    struct sm_nic *nic;
    int i = 0, err;

    while (i < SM_CONTROL_NICS && c->nics[i])
        i++;
    if (i == SM_CONTROL_NICS)
        return fail(c, -ENOSPC, "too many cards");
    get_text(args, "path", path, sizeof(path));
    get_text(args, "tap", tap, sizeof(tap));
    snprintf(name, sizeof(name), "net%d", i);
    err = sm_nic_create(name, path, &nic);
    if (err)
        return fail(c, err, "%s: %s", path, strerror(-err));
    err = open_nic(c, args, nic, tap);
    if (err) {
        sm_nic_destroy(nic);
        return err;
    }
    c->nics[i] = nic;
    sm_msg_put_map(&c->result, tap[0] ? 2 : 1);
    sm_msg_put_str(&c->result, "nic");
    sm_msg_put_int(&c->result, i);
    if (tap[0]) {
        sm_msg_put_str(&c->result, "tap");
        sm_msg_put_str(&c->result, tap);
    }
    return 0;
}

/* ---- the others ---- */

static void put_pair(struct sm_msg_writer *w, const char *key, uint64_t value)
{
    sm_msg_put_str(w, key);
    sm_msg_put_uint(w, value);
}

static int net_publish(struct sm_control *c, const struct sm_msg_reader *args)
{
    struct sm_nic *nic = get_nic(c, args);
    struct sockaddr_storage host = { 0 };
    int64_t port = get_int(args, "port", 0), guest = get_int(args, "guest", 0);
    bool udp = get_bool(args, "udp");
    struct sm_addr a;
    char text[64];
    int err;

    if (!nic)
        return -ENOENT;
    if (strcmp(nic->backend->ops->type, "user"))
        return fail(c, -ENOTSUP, "ports are published by the user network only");
    if (port < 0 || port > 65535 || guest < 1 || guest > 65535)
        return fail(c, -EINVAL, "publish: ports are 1 to 65535");
    if (!sm_addr_parse(get_text(args, "addr", text, sizeof(text)), &a))
        return fail(c, -EINVAL, "publish: '%s' is no address", text);
    if (a.family == 4) {
        struct sockaddr_in *in = (struct sockaddr_in *)&host;

        in->sin_family = AF_INET;
        in->sin_port = htons((uint16_t)port);
        memcpy(&in->sin_addr, a.b, 4);
    } else {
        struct sockaddr_in6 *in = (struct sockaddr_in6 *)&host;

        in->sin6_family = AF_INET6;
        in->sin6_port = htons((uint16_t)port);
        memcpy(&in->sin6_addr, a.b, 16);
    }
    err = sm_user_publish(nic->backend, udp, &host, (uint16_t)guest);
    if (err)
        return fail(c, err, "cannot publish %s port %d at %s: %s", udp ? "UDP" : "TCP", (int)port, text,
                    err == -EADDRINUSE ? "the port is taken"
                    : err == -EACCES   ? "no permission (ports below 1024 are root's)"
                                       : strerror(-err));
    sm_msg_put_int(&c->result, ntohs(a.family == 4 ? ((struct sockaddr_in *)&host)->sin_port
                                                : ((struct sockaddr_in6 *)&host)->sin6_port));
    return 0;
}

static int net_ready(struct sm_control *c, const struct sm_msg_reader *args)
{
    struct sm_nic *nic = get_nic(c, args);

    if (!nic)
        return -ENOENT;
    nic->ready = true;
    nic->ready_ns = sm_io_now_ns();
    sm_msg_put_bool(&c->result, true);
    return 0;
}

static int net_decide(struct sm_control *c, const struct sm_msg_reader *args)
{
    struct sm_nic *nic = get_nic(c, args);
    int err;

    if (!nic)
        return -ENOENT;
    err = sm_nic_decide(nic, (uint32_t)get_int(args, "flow", 0), get_bool(args, "allow"));
    sm_msg_put_bool(&c->result, !err); /* false: it ended meanwhile */
    return 0;
}

static int net_capture(struct sm_control *c, const struct sm_msg_reader *args)
{
    struct sm_nic *nic = get_nic(c, args);
    int64_t ends = get_int(args, "capture", 0), lost;
    struct sm_pcap *p;
    uint32_t id = 0;
    int err;

    if (!nic)
        return -ENOENT;
    if (ends > 0) {
        lost = sm_captures_end(&nic->captures, (uint32_t)ends);
        sm_msg_put_map(&c->result, 1);
        put_pair(&c->result, "lost", lost < 0 ? 0 : (uint64_t)lost);
        return 0;
    }
    if (c->passed_fd < 0)
        return fail(c, -EBADF, "capture: no descriptor came along");
    err = sm_pcap_new(c->passed_fd, &p);
    c->passed_fd = -1;
    err = err ? err : sm_captures_add(&nic->captures, p, &id);
    if (err)
        return fail(c, err, "capture: %s",
                    err == -ENOSPC ? "the card has as many as there can be" : strerror(-err));
    sm_msg_put_map(&c->result, 1);
    put_pair(&c->result, "capture", id);
    return 0;
}

static int net_close(struct sm_control *c, const struct sm_msg_reader *args)
{
    struct sm_nic *nic = get_nic(c, args);

    if (!nic)
        return -ENOENT;
    c->nics[index_of(c, nic)] = NULL;
    sm_nic_destroy(nic);
    sm_msg_put_bool(&c->result, true);
    return 0;
}

static int net_confine(struct sm_control *c, const struct sm_msg_reader *args)
{
    struct sm_confinement done;
    int err = sm_confine_network(&done, get_bool(args, "files"));

    if (err)
        return fail(c, err, "cannot confine the network process: %s", strerror(-err));
    sm_msg_put_map(&c->result, 2);
    sm_msg_put_str(&c->result, "seccomp");
    sm_msg_put_bool(&c->result, done.seccomp);
    sm_msg_put_str(&c->result, "landlock");
    sm_msg_put_int(&c->result, done.landlock);
    return 0;
}

/* ---- counters ---- */

static const char *proto_text(uint8_t proto)
{
    return proto == IPPROTO_TCP ? "tcp" : proto == IPPROTO_UDP ? "udp" : "icmp";
}

static const char *verdict_text(enum sm_verdict v)
{
    return v == SM_PASS ? "pass" : v == SM_ASK ? "asked" : "refused";
}

static void put_flow_keys(struct sm_msg_writer *w, const struct sm_flow *f)
{
    char text[SM_ADDR_TEXT];

    sm_msg_put_str(w, "proto");
    sm_msg_put_str(w, proto_text(f->proto));
    sm_msg_put_str(w, "addr");
    sm_msg_put_str(w, sm_addr_text(&f->remote, text));
    put_pair(w, "port", f->remote_port);
    put_pair(w, "local_port", f->local_port);
}

static int net_stats(struct sm_control *c, const struct sm_msg_reader *args)
{
    struct sm_nic *nic = get_nic(c, args);
    struct sm_msg_writer *w = &c->result;
    uint32_t count = 0, shown = 0;

    if (!nic)
        return -ENOENT;
    while (count < SM_NIC_REASONS && nic->drops[count].why)
        count++;
    sm_msg_put_map(w, 9);
    put_pair(w, "out_frames", nic->out_frames);
    put_pair(w, "out_bytes", nic->out_bytes);
    put_pair(w, "in_frames", nic->in_frames);
    put_pair(w, "in_bytes", nic->in_bytes);
    put_pair(w, "in_dropped", nic->in_dropped);
    put_pair(w, "dns_questions", nic->dns_questions);
    put_pair(w, "events_lost", c->events_lost);
    sm_msg_put_str(w, "drops");
    sm_msg_put_map(w, count);
    for (uint32_t i = 0; i < count; i++)
        put_pair(w, nic->drops[i].why, nic->drops[i].count);
    sm_msg_put_str(w, "flows");
    for (uint32_t i = nic->policy.newest; i && shown < STAT_FLOWS; i = nic->policy.flows[i - 1].older)
        shown++;
    sm_msg_put_array(w, shown);
    for (uint32_t i = nic->policy.newest; i && shown; i = nic->policy.flows[i - 1].older, shown--) {
        const struct sm_flow *f = &nic->policy.flows[i - 1];

        sm_msg_put_map(w, 10);
        put_flow_keys(w, f);
        sm_msg_put_str(w, "verdict");
        sm_msg_put_str(w, verdict_text(f->verdict));
        sm_msg_put_str(w, "inbound");
        sm_msg_put_bool(w, f->inbound);
        put_pair(w, "out_frames", f->out_frames);
        put_pair(w, "out_bytes", f->out_bytes);
        put_pair(w, "in_frames", f->in_frames);
        put_pair(w, "in_bytes", f->in_bytes);
    }
    return 0;
}

/* ---- events ---- */

void sm_control_event(struct sm_control *c, struct sm_nic *nic, const struct sm_nic_event *e,
                      struct sm_msg_writer *w)
{
    static const char *const types[] = { "blocked", "flow", "rebinding", "name", "gone" };
    const char *name = e->name;
    char text[SM_ADDR_TEXT];
    bool addr = e->kind == SM_NIC_REBINDING;

    if (!name && e->flow)
        name = sm_policy_name_of(&nic->policy, &e->flow->remote);
    sm_msg_put_map(w, 2 + (e->flow ? 5 : 0) + (name ? 1 : 0) + (e->why ? 1 : 0) + addr);
    sm_msg_put_str(w, "type");
    sm_msg_put_str(w, types[e->kind]);
    sm_msg_put_str(w, "nic");
    sm_msg_put_int(w, index_of(c, nic));
    if (e->flow) {
        put_pair(w, "flow", e->flow->id);
        put_flow_keys(w, e->flow);
    }
    if (name) {
        sm_msg_put_str(w, "name");
        sm_msg_put_str(w, name);
    }
    if (e->why) {
        sm_msg_put_str(w, "why");
        sm_msg_put_str(w, e->why);
    }
    if (addr) {
        sm_msg_put_str(w, "addr");
        sm_msg_put_str(w, sm_addr_text(&e->addr, text));
    }
}

/* ---- dispatch ---- */

int sm_control_request(struct sm_control *c, const struct sm_msg_value *name,
                       const struct sm_msg_reader *args)
{
    static const struct {
        const char *name;
        int (*run)(struct sm_control *, const struct sm_msg_reader *);
    } table[] = {
        { "net.open", net_open },   { "net.publish", net_publish }, { "net.ready", net_ready },
        { "net.decide", net_decide }, { "net.stats", net_stats },   { "net.close", net_close },
        { "net.capture", net_capture },
        { "net.confine", net_confine },
    };

    c->err[0] = 0;
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++)
        if (sm_msg_is(name, table[i].name))
            return table[i].run(c, args);
    return fail(c, -EINVAL, "no such request");
}

void sm_control_close(struct sm_control *c)
{
    for (unsigned i = 0; i < SM_CONTROL_NICS; i++)
        sm_nic_destroy(c->nics[i]);
    sm_hub_destroy(c->hub);
}
