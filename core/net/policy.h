/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a guest may send, decided once per flow and cached.
 *
 *   frame ─▶ parser ─▶ who is it? (MAC, addresses: no spoofing)
 *                  ─▶ a flow we know? its verdict
 *                  ─▶ a new one: rules ─▶ the script's function ─▶ the default
 *
 * A flow is (protocol, local port, remote address, remote port). Rules are
 * lists of networks or names, with ports; a deny rule beats an allow rule. A
 * name stands for the addresses that our own DNS answered for it, for as long
 * as their TTL (60 s … 1 h). Whoever answers for it cannot open the host, a
 * link or a metadata service that way: only a rule for the address does. What
 * came in begins a flow as well, so replies pass. A TCP SYN with another
 * sequence number than the flow's is a new flow: a port that is used again is
 * decided again. The table is bounded; the oldest flow makes room, and is
 * simply decided anew if it lives.
 *
 * Some destinations are refused whatever the rules say, because no frame of an
 * honest guest has them: loopback, "this network", v4-mapped, multicast.
 *
 * Threads: one.
 */
#ifndef SM_NET_POLICY_H
#define SM_NET_POLICY_H

#include "packet.h"

#define SM_POLICY_RULES 256
#define SM_POLICY_NAME_RULES 64
#define SM_POLICY_FLOWS 8192
#define SM_POLICY_NAMES 1024 /* addresses with a name */
#define SM_POLICY_FRAGS 64
#define SM_NAME_BYTES 256

enum sm_verdict {
    SM_PASS,
    SM_DROP,   /* without a word */
    SM_REJECT, /* tell the guest */
    SM_ASK,    /* the script decides: hold the frame */
    SM_DNS,    /* a question for our resolver */
};

enum sm_policy_default { SM_DEFAULT_ALLOW_ALL, SM_DEFAULT_DENY_PRIVATE, SM_DEFAULT_DENY };

enum sm_class {
    SM_CLASS_PUBLIC,
    SM_CLASS_HOST, /* the host: the gateway's address stands for its loopback */
    SM_CLASS_METADATA,
    SM_CLASS_LINK_LOCAL,
    SM_CLASS_PRIVATE,
    SM_CLASS_SPECIAL, /* documentation, benchmarks, future use */
    SM_CLASS_NEVER,   /* loopback, multicast, v4-mapped … */
};

struct sm_rule {
    bool allow;
    bool host;            /* the host by its gateway address */
    char *name;           /* "example.org", "*.example.org"; NULL: a network */
    unsigned name_bit;
    struct sm_addr net;   /* family 0: every address */
    unsigned prefix;
    uint16_t port_from, port_to; /* 0 … 65535 */
};

struct sm_flow {
    uint8_t proto;
    bool used, inbound, established;
    bool closed; /* reset, or both sides have said all */
    uint8_t fins;
    enum sm_verdict verdict; /* PASS, REJECT or ASK */
    const char *why;
    struct sm_addr remote;
    uint16_t local_port, remote_port;
    uint32_t isn, id;
    uint64_t since_ns, seen_ns;
    uint64_t out_frames, out_bytes, in_frames, in_bytes;
    void *held;         /* a frame that waits for a verdict, or a SYN to repeat */
    size_t held_len;
    uint64_t again_ns;  /* when to repeat it; 0: not */
    uint32_t hash_next, newer, older; /* indices + 1; 0: none */
};

struct sm_policy_names {
    struct sm_addr addr;
    uint64_t until_ns, rules; /* bits of name rules */
    char name[SM_NAME_BYTES];
};

struct sm_policy {
    /* set up once */
    uint8_t mac[6];
    struct sm_addr ip4, ip6;     /* the guest's; family 0: any */
    struct sm_addr gw4, gw6;     /* stand for the host's loopback, or family 0 */
    struct sm_addr dns4, dns6;   /* our resolver, or family 0 */
    struct sm_addr subnet4, subnet6; /* virtual: nobody else is there */
    unsigned prefix4, prefix6;
    bool dhcp; /* the backend answers */
    bool link; /* a shared segment: other machines' frames arrive */
    enum sm_policy_default fallback;
    bool ask; /* new flows go to the script */
    struct sm_rule rules[SM_POLICY_RULES];
    unsigned rule_count, name_rules;
    struct sm_addr own[32]; /* of the host's interfaces */
    unsigned own_count;
    /* state */
    struct sm_policy_names *names;
    unsigned next_name;
    struct {
        struct sm_addr src, dst;
        uint8_t proto;
        uint32_t id;
        uint64_t seen_ns;
    } frags[SM_POLICY_FRAGS];
    unsigned next_frag;
    struct sm_flow *flows;
    uint32_t *buckets; /* index + 1 */
    uint32_t newest, oldest, free_flow, flow_count, next_id;
    void (*flow_gone)(struct sm_flow *flow, void *arg); /* frees `held` */
    void *arg;
};

int sm_policy_init(struct sm_policy *p);
void sm_policy_free(struct sm_policy *p);

/*
 * "example.org:443", "*.example.org", "10.0.0.0/8", "[fd00::/8]:1-100",
 * "host:8080". 0, -EINVAL, -ENOSPC; err gets one clause of reason.
 */
int sm_policy_add_rule(struct sm_policy *p, bool allow, const char *text, const char **err);

enum sm_class sm_policy_class(const struct sm_policy *p, const struct sm_addr *a);
const char *sm_class_text(enum sm_class c);

/* A frame of the guest. *why on DROP and REJECT; *flow may be NULL; *fresh: the
 * verdict was made now. */
enum sm_verdict sm_policy_out(struct sm_policy *p, const struct sm_packet *pkt, uint64_t now_ns,
                              struct sm_flow **flow, const char **why, bool *fresh);
/* A frame for the guest; the flow it belongs to or begins, or NULL. */
struct sm_flow *sm_policy_in(struct sm_policy *p, const struct sm_packet *pkt, uint64_t now_ns);
struct sm_flow *sm_policy_flow(struct sm_policy *p, uint32_t id);

/* Whether this name may be asked for; and what an answer for it teaches.
 * learn: false when the address must not be told to the guest (rebinding). */
bool sm_policy_may_ask(const struct sm_policy *p, const char *name);
bool sm_policy_learn(struct sm_policy *p, const char *name, const struct sm_addr *addr,
                     uint32_t ttl_s, uint64_t now_ns);
/* The newest name of an address, or NULL. */
const char *sm_policy_name_of(const struct sm_policy *p, const struct sm_addr *addr);

#endif
