/* SPDX-License-Identifier: Apache-2.0 */
/* Who may talk to whom; see policy.h. The table of flows is policy_flow.c. */
#include "policy.h"
#include "policy_flow.h"

#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define FRAG_NS 30000000000ull
#define UDP_IDLE_NS 120000000000ull
#define REFUSED_NS 60000000000ull

struct known {
    const char *net;
    unsigned prefix;
    enum sm_class class;
};

/* First match wins. Sources: IANA's special-purpose registries. */
static const struct known known[] = {
    { "169.254.169.254", 32, SM_CLASS_METADATA },
    { "100.100.100.200", 32, SM_CLASS_METADATA },
    { "fd00:ec2::254", 128, SM_CLASS_METADATA },
    { "0.0.0.0", 8, SM_CLASS_NEVER },
    { "127.0.0.0", 8, SM_CLASS_NEVER },
    { "224.0.0.0", 4, SM_CLASS_NEVER },
    { "255.255.255.255", 32, SM_CLASS_NEVER },
    { "10.0.0.0", 8, SM_CLASS_PRIVATE },
    { "172.16.0.0", 12, SM_CLASS_PRIVATE },
    { "192.168.0.0", 16, SM_CLASS_PRIVATE },
    { "100.64.0.0", 10, SM_CLASS_PRIVATE },
    { "169.254.0.0", 16, SM_CLASS_LINK_LOCAL },
    { "192.0.0.0", 24, SM_CLASS_SPECIAL },
    { "192.0.2.0", 24, SM_CLASS_SPECIAL },
    { "198.18.0.0", 15, SM_CLASS_SPECIAL },
    { "198.51.100.0", 24, SM_CLASS_SPECIAL },
    { "203.0.113.0", 24, SM_CLASS_SPECIAL },
    { "192.88.99.0", 24, SM_CLASS_SPECIAL },
    { "240.0.0.0", 4, SM_CLASS_SPECIAL },
    { "::ffff:0:0", 96, SM_CLASS_NEVER }, /* v4-mapped: a socket would go to IPv4 */
    { "::", 96, SM_CLASS_NEVER },         /* unspecified, loopback, v4-compatible */
    { "ff00::", 8, SM_CLASS_NEVER },
    { "fe80::", 10, SM_CLASS_LINK_LOCAL },
    { "fec0::", 10, SM_CLASS_PRIVATE },
    { "fc00::", 7, SM_CLASS_PRIVATE },
    { "64:ff9b:1::", 48, SM_CLASS_PRIVATE },
    { "2001:db8::", 32, SM_CLASS_SPECIAL },
    { "100::", 64, SM_CLASS_SPECIAL },
    { "2001::", 32, SM_CLASS_SPECIAL }, /* Teredo hides an IPv4 address */
};
#define KNOWN (sizeof(known) / sizeof(known[0]))

/* IPv6 prefixes in which an IPv4 address is embedded, and where. */
static bool embedded(const struct sm_addr *a, struct sm_addr *v4)
{
    static const uint8_t nat64[12] = { 0, 0x64, 0xff, 0x9b };
    const uint8_t *p = NULL;

    if (a->family != 6)
        return false;
    if (!memcmp(a->b, nat64, 12))
        p = a->b + 12;
    else if (a->b[0] == 0x20 && a->b[1] == 0x02) /* 6to4 */
        p = a->b + 2;
    if (!p)
        return false;
    memset(v4, 0, sizeof(*v4));
    v4->family = 4;
    memcpy(v4->b, p, 4);
    return true;
}

enum sm_class sm_policy_class(const struct sm_policy *p, const struct sm_addr *a)
{
    struct sm_addr inner;

    if ((p->gw4.family && sm_addr_equal(a, &p->gw4)) ||
        (p->gw6.family && sm_addr_equal(a, &p->gw6)))
        return SM_CLASS_HOST;
    for (unsigned i = 0; i < p->own_count; i++)
        if (sm_addr_equal(a, &p->own[i]))
            return SM_CLASS_HOST;
    for (size_t i = 0; i < KNOWN; i++) {
        struct sm_addr net;

        sm_addr_parse(known[i].net, &net);
        if (sm_addr_in(a, &net, known[i].prefix))
            return known[i].class;
    }
    if (embedded(a, &inner)) {
        enum sm_class c = sm_policy_class(p, &inner);

        return c == SM_CLASS_PUBLIC ? c : c == SM_CLASS_NEVER ? SM_CLASS_SPECIAL : c;
    }
    return SM_CLASS_PUBLIC;
}

const char *sm_class_text(enum sm_class c)
{
    static const char *const text[] = {
        "public address",     "the host",        "metadata service",
        "link-local address", "private address", "special-purpose address",
        "address that never leaves a machine",
    };
    return text[c];
}

/* ---- rules ---- */

static bool parse_ports(const char *text, struct sm_rule *r)
{
    unsigned from, to;
    int end = 0;

    if (sscanf(text, "%5u-%5u%n", &from, &to, &end) != 2 || text[end]) {
        end = 0;
        if (sscanf(text, "%5u%n", &from, &end) != 1 || text[end])
            return false;
        to = from;
    }
    if (!from || from > to || to > 65535)
        return false;
    r->port_from = (uint16_t)from;
    r->port_to = (uint16_t)to;
    return true;
}

static bool name_ok(const char *n)
{
    size_t len = strlen(n);

    if (n[0] == '*' && n[1] == '.')
        n += 2;
    if (!*n || len > 253)
        return false;
    for (; *n; n++)
        if (!(*n == '-' || *n == '_' || *n == '.' || (*n >= '0' && *n <= '9') ||
              (*n >= 'a' && *n <= 'z') || (*n >= 'A' && *n <= 'Z')))
            return false;
    return true;
}

/* Network, host or name; what is before the ports. */
static int parse_where(struct sm_policy *p, char *where, struct sm_rule *r, const char **err)
{
    char *slash = strchr(where, '/');
    unsigned most, prefix;
    int end = 0;

    if (slash)
        *slash++ = 0;
    if (sm_addr_parse(where, &r->net)) {
        most = prefix = r->net.family == 4 ? 32 : 128;
        if (slash && (sscanf(slash, "%3u%n", &prefix, &end) != 1 || slash[end] || prefix > most)) {
            *err = "malformed network: the prefix is 0 to 32, or 128 for IPv6";
            return -EINVAL;
        }
        r->prefix = prefix;
        /* The host's loopback is reached by the gateway's address. */
        if (r->net.family == 4 && r->net.b[0] == 127) {
            r->host = true;
        } else if (r->net.family == 6 && prefix == 128) {
            struct sm_addr one;

            sm_addr_parse("::1", &one);
            r->host = sm_addr_equal(&r->net, &one);
        }
        return 0;
    }
    if (slash) {
        *err = "malformed network: expected ADDRESS/PREFIX";
        return -EINVAL;
    }
    if (!strcasecmp(where, "host") || !strcasecmp(where, "localhost") ||
        !strcasecmp(where, "host.docker.internal")) {
        r->host = true;
        return 0;
    }
    if (!strcmp(where, "*"))
        return 0; /* family 0: everything */
    if (!name_ok(where) || strspn(where, "0123456789.") == strlen(where)) {
        *err = "expected a name, an address or a network";
        return -EINVAL;
    }
    if (p->name_rules == SM_POLICY_NAME_RULES) {
        *err = "too many names";
        return -ENOSPC;
    }
    r->name = strdup(where);
    r->name_bit = p->name_rules++;
    return r->name ? 0 : -ENOMEM;
}

int sm_policy_add_rule(struct sm_policy *p, bool allow, const char *text, const char **err)
{
    struct sm_rule r = { .allow = allow, .port_to = 65535 };
    char copy[320], *where = copy, *ports = NULL;
    int rc;

    *err = "too long";
    if (strlen(text) >= sizeof(copy))
        return -EINVAL;
    strcpy(copy, text);
    if (copy[0] == '[') { /* [v6] or [v6/n], ports after a colon */
        char *close = strchr(copy, ']');

        *err = "expected ']'";
        if (!close || (close[1] && close[1] != ':'))
            return -EINVAL;
        *close = 0;
        where = copy + 1;
        ports = close[1] ? close + 2 : NULL;
    } else if (strchr(copy, ':') && strchr(copy, ':') == strrchr(copy, ':')) {
        ports = strchr(copy, ':');
        *ports++ = 0;
    }
    *err = "malformed port: expected 1 to 65535, or FROM-TO";
    if (ports && !parse_ports(ports, &r))
        return -EINVAL;
    *err = "too many rules";
    if (p->rule_count == SM_POLICY_RULES)
        return -ENOSPC;
    rc = parse_where(p, where, &r, err);
    if (!rc)
        p->rules[p->rule_count++] = r;
    return rc;
}

static bool name_matches(const char *rule, const char *name)
{
    size_t r = strlen(rule), n = strlen(name);

    if (rule[0] != '*')
        return r == n && !strcasecmp(rule, name);
    /* "*.example.org": anything below, not itself */
    return n > r - 1 && !strcasecmp(rule + 1, name + n - (r - 1));
}

static uint64_t rules_of_name(const struct sm_policy *p, const char *name)
{
    uint64_t bits = 0;

    for (unsigned i = 0; i < p->rule_count; i++)
        if (p->rules[i].name && name_matches(p->rules[i].name, name))
            bits |= 1ull << p->rules[i].name_bit;
    return bits;
}

static uint64_t rules_of_addr(const struct sm_policy *p, const struct sm_addr *a, uint64_t now)
{
    uint64_t bits = 0;

    for (unsigned i = 0; i < SM_POLICY_NAMES; i++)
        if (p->names[i].rules && p->names[i].until_ns > now && sm_addr_equal(&p->names[i].addr, a))
            bits |= p->names[i].rules;
    return bits;
}

static bool rule_matches(const struct sm_policy *p, const struct sm_rule *r, const struct sm_addr *a,
                         uint64_t names, enum sm_class class)
{
    if (r->name)
        return names >> r->name_bit & 1;
    if (r->host)
        return (p->gw4.family && sm_addr_equal(a, &p->gw4)) ||
               (p->gw6.family && sm_addr_equal(a, &p->gw6));
    if (!r->net.family)
        return class != SM_CLASS_HOST; /* "*" opens the world, not the host */
    return sm_addr_in(a, &r->net, r->prefix);
}

/* Whether a name on the list opens an address of this kind that it resolves to. A private
 * one is somebody's intranet; who answers for a name must not open the host or a cloud's
 * metadata with it. Those are opened by their address. */
static bool name_opens(enum sm_class class)
{
    return class == SM_CLASS_PUBLIC || class == SM_CLASS_PRIVATE || class == SM_CLASS_SPECIAL;
}

/* The verdict for a new flow to a:port (0: no port, ICMP). */
static enum sm_verdict judge(struct sm_policy *p, const struct sm_addr *a, uint16_t port,
                             uint64_t now, const char **why)
{
    enum sm_class class = sm_policy_class(p, a);
    uint64_t names = rules_of_addr(p, a, now);
    bool allowed = false;

    if (class == SM_CLASS_NEVER) {
        *why = sm_class_text(class);
        return SM_REJECT;
    }
    for (unsigned i = 0; i < p->rule_count; i++) {
        const struct sm_rule *r = &p->rules[i];

        if (!rule_matches(p, r, a, names, class) || (port && (port < r->port_from || port > r->port_to)))
            continue;
        if (!r->allow) {
            *why = "denied by a rule";
            return SM_REJECT;
        }
        allowed |= !r->name || name_opens(class);
    }
    if (allowed)
        return SM_PASS;
    if (p->ask)
        return SM_ASK;
    if (p->fallback == SM_DEFAULT_ALLOW_ALL ||
        (p->fallback == SM_DEFAULT_DENY_PRIVATE && class == SM_CLASS_PUBLIC))
        return SM_PASS;
    *why = p->fallback == SM_DEFAULT_DENY ? "not on the list" : sm_class_text(class);
    return SM_REJECT;
}

/* ---- names ---- */

bool sm_policy_may_ask(const struct sm_policy *p, const char *name)
{
    bool allowed = p->fallback != SM_DEFAULT_DENY || p->ask;

    for (unsigned i = 0; i < p->rule_count; i++) {
        const struct sm_rule *r = &p->rules[i];

        if (!r->name || !name_matches(r->name, name))
            continue;
        if (!r->allow)
            return false;
        allowed = true;
    }
    return allowed;
}

bool sm_policy_learn(struct sm_policy *p, const char *name, const struct sm_addr *addr,
                     uint32_t ttl_s, uint64_t now_ns)
{
    struct sm_policy_names *slot = NULL;
    uint64_t bits = rules_of_name(p, name);
    enum sm_class class = sm_policy_class(p, addr);

    if (class == SM_CLASS_NEVER && p->fallback != SM_DEFAULT_ALLOW_ALL)
        return false;
    if (class != SM_CLASS_PUBLIC && p->fallback != SM_DEFAULT_ALLOW_ALL &&
        (!bits || !name_opens(class))) {
        /* A name of the world that points inside: only if inside is open. */
        bool open = false;

        for (unsigned i = 0; i < p->rule_count; i++)
            open |= p->rules[i].allow && !p->rules[i].name &&
                    rule_matches(p, &p->rules[i], addr, 0, class);
        if (!open)
            return false;
    }
    ttl_s = ttl_s < 60 ? 60 : ttl_s > 3600 ? 3600 : ttl_s;
    for (unsigned i = 0; i < SM_POLICY_NAMES; i++)
        if (sm_addr_equal(&p->names[i].addr, addr) && !strcasecmp(p->names[i].name, name))
            slot = &p->names[i];
    if (!slot)
        slot = &p->names[p->next_name++ % SM_POLICY_NAMES];
    slot->addr = *addr;
    slot->rules = bits;
    slot->until_ns = now_ns + ttl_s * 1000000000ull;
    snprintf(slot->name, sizeof(slot->name), "%s", name);
    return true;
}

const char *sm_policy_name_of(const struct sm_policy *p, const struct sm_addr *addr)
{
    const struct sm_policy_names *best = NULL;

    for (unsigned i = 0; i < SM_POLICY_NAMES; i++)
        if (p->names[i].until_ns && sm_addr_equal(&p->names[i].addr, addr) &&
            (!best || p->names[i].until_ns > best->until_ns))
            best = &p->names[i];
    return best ? best->name : NULL;
}

/* ---- who is it? ---- */

static void link_local_of(const uint8_t mac[6], struct sm_addr *out)
{
    const uint8_t b[16] = { 0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe,
                            mac[3], mac[4], mac[5] };

    out->family = 6;
    memcpy(out->b, b, 16);
}

static bool unspecified(const struct sm_addr *a)
{
    static const uint8_t zero[16];

    return !memcmp(a->b, zero, 16);
}

/* Whether a is an address the guest has. */
static bool is_ours(const struct sm_policy *p, const struct sm_addr *a)
{
    const struct sm_addr *own = a->family == 4 ? &p->ip4 : &p->ip6;
    struct sm_addr local;

    if (!own->family && a->family == 4)
        return true;
    if (own->family && sm_addr_equal(a, own))
        return true;
    link_local_of(p->mac, &local);
    return a->family == 6 && (sm_addr_equal(a, &local) || (!own->family && !unspecified(a)));
}

static const char *check_arp(const struct sm_policy *p, const struct sm_packet *pkt)
{
    if (pkt->arp_op != 1 && pkt->arp_op != 2)
        return "malformed ARP";
    if (memcmp(pkt->link, p->mac, 6))
        return "ARP in another's name";
    if (!is_ours(p, &pkt->src) && !(pkt->arp_op == 1 && unspecified(&pkt->src)))
        return "ARP for another's address";
    return NULL;
}

static const char *check_nd(const struct sm_policy *p, const struct sm_packet *pkt)
{
    if (pkt->icmp_type == 134 || pkt->icmp_type == 137)
        return "a guest is no router";
    if (pkt->link && memcmp(pkt->link, p->mac, 6))
        return "neighbour discovery in another's name";
    if (pkt->icmp_type == 136 && !is_ours(p, &pkt->target))
        return "neighbour discovery for another's address";
    return NULL;
}

static bool is_dhcp(const struct sm_packet *pkt)
{
    return pkt->kind == SM_PACKET_UDP && pkt->sport == 68 && pkt->dport == 67 &&
           pkt->src.family == 4;
}

/* Addresses that the virtual network has nobody at. */
static bool nobody(const struct sm_policy *p, const struct sm_addr *a)
{
    if (p->link || sm_addr_equal(a, &p->gw4) || sm_addr_equal(a, &p->gw6) ||
        sm_addr_equal(a, &p->dns4) || sm_addr_equal(a, &p->dns6))
        return false;
    return (p->subnet4.family && sm_addr_in(a, &p->subnet4, p->prefix4)) ||
           (p->subnet6.family && sm_addr_in(a, &p->subnet6, p->prefix6));
}

/* ---- fragments ---- */

static void remember_fragment(struct sm_policy *p, const struct sm_packet *pkt, uint64_t now)
{
    unsigned i = p->next_frag++ % SM_POLICY_FRAGS;

    p->frags[i].src = pkt->src;
    p->frags[i].dst = pkt->dst;
    p->frags[i].proto = pkt->proto;
    p->frags[i].id = pkt->frag_id;
    p->frags[i].seen_ns = now;
}

static bool known_fragment(const struct sm_policy *p, const struct sm_packet *pkt, uint64_t now)
{
    for (unsigned i = 0; i < SM_POLICY_FRAGS; i++)
        if (p->frags[i].seen_ns && now - p->frags[i].seen_ns < FRAG_NS &&
            p->frags[i].id == pkt->frag_id && p->frags[i].proto == pkt->proto &&
            sm_addr_equal(&p->frags[i].dst, &pkt->dst) && sm_addr_equal(&p->frags[i].src, &pkt->src))
            return true;
    return false;
}

/* ---- frames ---- */

/* Whether an existing flow must be judged again. */
static bool is_stale(const struct sm_flow *f, const struct sm_packet *pkt, uint64_t now)
{
    uint64_t idle = now - f->seen_ns;

    if (f->inbound && !f->closed)
        return false;
    if (pkt->kind == SM_PACKET_TCP) {
        if ((pkt->tcp_flags & (SM_TCP_SYN | SM_TCP_ACK)) == SM_TCP_SYN && pkt->seq != f->isn)
            return true;
        return f->verdict == SM_REJECT && idle > REFUSED_NS;
    }
    return f->verdict == SM_REJECT ? idle > REFUSED_NS : idle > UDP_IDLE_NS;
}

static void see(struct sm_flow *f, const struct sm_packet *pkt, bool out, uint64_t now)
{
    f->seen_ns = now;
    *(out ? &f->out_frames : &f->in_frames) += 1;
    *(out ? &f->out_bytes : &f->in_bytes) += pkt->len;
    if (pkt->kind != SM_PACKET_TCP)
        return;
    if (pkt->tcp_flags & SM_TCP_RST)
        f->closed = true;
    if (pkt->tcp_flags & SM_TCP_FIN)
        f->fins |= out ? 1 : 2;
    if (f->fins == 3)
        f->closed = true;
    if (out == f->inbound && (pkt->tcp_flags & (SM_TCP_SYN | SM_TCP_ACK)) == (SM_TCP_SYN | SM_TCP_ACK))
        f->established = true;
}

static enum sm_verdict out_flow(struct sm_policy *p, const struct sm_packet *pkt, uint64_t now,
                                struct sm_flow **flow, const char **why, bool *fresh)
{
    bool echo = pkt->icmp_type == 8 || pkt->icmp_type == 128;
    uint16_t port = pkt->kind == SM_PACKET_ICMP ? 0 : pkt->dport;
    struct sm_flow *f = sm_flow_find(p, pkt->proto, &pkt->dst, pkt->sport, port);
    enum sm_verdict v;

    if (f && is_stale(f, pkt, now)) {
        sm_flow_drop(p, f);
        f = NULL;
    }
    /* A guest asks by echo, and answers who asked it; a ping of its own is no
     * cover for anything else. */
    if (pkt->kind == SM_PACKET_ICMP && !echo && !(f && f->inbound)) {
        *why = "ICMP that no flow asked for";
        return SM_DROP;
    }
    if (!f) {
        if (nobody(p, &pkt->dst)) {
            *why = "no such address";
            v = SM_REJECT;
        } else if (pkt->kind == SM_PACKET_ICMP && sm_policy_class(p, &pkt->dst) == SM_CLASS_HOST &&
                   (sm_addr_equal(&pkt->dst, &p->gw4) || sm_addr_equal(&pkt->dst, &p->gw6))) {
            v = SM_PASS; /* the gateway answers itself, nothing leaves */
        } else {
            v = judge(p, &pkt->dst, port, now, why);
        }
        f = sm_flow_add(p, pkt->proto, &pkt->dst, pkt->sport, port, now);
        f->verdict = v;
        f->why = *why;
        f->isn = pkt->seq;
        *fresh = true;
    }
    see(f, pkt, true, now);
    sm_flow_touch(p, f);
    *flow = f;
    *why = f->why;
    return f->verdict;
}

enum sm_verdict sm_policy_out(struct sm_policy *p, const struct sm_packet *pkt, uint64_t now_ns,
                              struct sm_flow **flow, const char **why, bool *fresh)
{
    enum sm_verdict v;

    *flow = NULL;
    *fresh = false;
    *why = NULL;
    if (pkt->len >= 14 && memcmp(pkt->frame + 6, p->mac, 6)) {
        *why = "another's MAC address";
        return SM_DROP;
    }
    if (pkt->kind == SM_PACKET_BAD) {
        *why = pkt->why;
        return SM_DROP;
    }
    if (pkt->kind == SM_PACKET_ARP || pkt->kind == SM_PACKET_ND) {
        *why = pkt->kind == SM_PACKET_ARP ? check_arp(p, pkt) : check_nd(p, pkt);
        if (!*why && pkt->kind == SM_PACKET_ND && !is_ours(p, &pkt->src) && !unspecified(&pkt->src))
            *why = "another's IP address";
        return *why ? SM_DROP : SM_PASS;
    }
    if (is_dhcp(pkt)) {
        struct sm_addr all;

        sm_addr_parse("255.255.255.255", &all);
        if (p->dhcp && (sm_addr_equal(&pkt->dst, &all) || sm_addr_equal(&pkt->dst, &p->gw4)) &&
            !pkt->first_fragment)
            return SM_PASS;
    }
    if (!is_ours(p, &pkt->src)) {
        *why = "another's IP address";
        return SM_DROP;
    }
    if (pkt->frame[0] & 1) {
        *why = "multicast";
        return SM_DROP;
    }
    if (pkt->kind == SM_PACKET_FRAGMENT) {
        if (known_fragment(p, pkt, now_ns))
            return SM_PASS;
        *why = "fragment without its first";
        return SM_DROP;
    }
    if (sm_addr_equal(&pkt->dst, &p->dns4) || sm_addr_equal(&pkt->dst, &p->dns6)) {
        if (pkt->kind == SM_PACKET_UDP && pkt->dport == 53 && !pkt->first_fragment)
            return SM_DNS;
        *why = "the resolver answers on UDP port 53 only";
        return SM_REJECT;
    }
    v = out_flow(p, pkt, now_ns, flow, why, fresh);
    if (v == SM_PASS && pkt->first_fragment)
        remember_fragment(p, pkt, now_ns);
    return v;
}

struct sm_flow *sm_policy_in(struct sm_policy *p, const struct sm_packet *pkt, uint64_t now_ns)
{
    struct sm_flow *f;
    bool syn = pkt->kind == SM_PACKET_TCP &&
               (pkt->tcp_flags & (SM_TCP_SYN | SM_TCP_ACK)) == SM_TCP_SYN;
    uint16_t local = pkt->kind == SM_PACKET_ICMP ? pkt->sport : pkt->dport;
    uint16_t remote = pkt->kind == SM_PACKET_ICMP ? 0 : pkt->sport;

    if (pkt->kind != SM_PACKET_TCP && pkt->kind != SM_PACKET_UDP && pkt->kind != SM_PACKET_ICMP)
        return NULL;
    f = sm_flow_find(p, pkt->proto, &pkt->src, local, remote);
    if (f && syn && (f->closed || f->verdict != SM_PASS || (f->inbound && f->isn != pkt->seq))) {
        sm_flow_drop(p, f);
        f = NULL;
    }
    if (!f) {
        f = sm_flow_add(p, pkt->proto, &pkt->src, local, remote, now_ns);
        f->verdict = SM_PASS;
        f->inbound = true;
        f->isn = pkt->seq;
    }
    see(f, pkt, false, now_ns);
    sm_flow_touch(p, f);
    return f;
}

/* ---- life ---- */

int sm_policy_init(struct sm_policy *p)
{
    memset(p, 0, sizeof(*p));
    p->names = calloc(SM_POLICY_NAMES, sizeof(*p->names));
    p->flows = calloc(SM_POLICY_FLOWS, sizeof(*p->flows));
    p->buckets = calloc(SM_POLICY_FLOWS, sizeof(*p->buckets));
    if (p->names && p->flows && p->buckets)
        return 0;
    sm_policy_free(p);
    return -ENOMEM;
}

void sm_policy_free(struct sm_policy *p)
{
    for (unsigned i = 0; p->flows && i < SM_POLICY_FLOWS; i++)
        free(p->flows[i].held);
    for (unsigned i = 0; i < p->rule_count; i++)
        free(p->rules[i].name);
    free(p->names);
    free(p->flows);
    free(p->buckets);
    memset(p, 0, sizeof(*p));
}
