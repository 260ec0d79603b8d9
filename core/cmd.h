/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The command table: all that can be asked of a machine, by name, with a
 * message for arguments and a message for the result.
 *
 * One table serves the in-process Lua binding and the worker alike, so both
 * know the same commands, refuse the same arguments with the same words, and
 * one spec runs against both. Arguments are checked in one place against what
 * the table says of them; a handler sees only arguments that passed.
 *
 * A machine is a VM and what is set up before it is created. It begins empty;
 * `vm.create` makes the VM.
 *
 * Threads: a machine belongs to one thread at a time.
 */
#ifndef SM_CMD_H
#define SM_CMD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "msg.h"

/* Memory and console bytes moved by one command, and what a message that
 * carries them can come to. */
#define SM_CMD_MAX_DATA_BYTES (8u << 20)
#define SM_CMD_MAX_MESSAGE_BYTES (SM_CMD_MAX_DATA_BYTES + (64u << 10))

enum sm_arg_type {
    SM_ARG_BOOL,
    SM_ARG_INT,    /* an integer from min to max */
    SM_ARG_U64,    /* any 64 bits; a negative integer is its two's complement */
    SM_ARG_NUMBER, /* a double */
    SM_ARG_SIZE,   /* bytes, from min to max: an integer, or "512M" (K, M, G, T) */
    SM_ARG_STRING, /* without NUL; at most max bytes when max is not 0 */
    SM_ARG_BYTES,
    SM_ARG_CHOICE, /* one of choices, separated by '|' */
    SM_ARG_ARRAY,
    SM_ARG_MAP,
};

struct sm_arg_spec {
    const char *key;
    enum sm_arg_type type;
    bool required;
    uint64_t min, max;
    const char *choices;
    const char *doc; /* completes "key: " */
};

struct sm_call;

/* What a command takes when its argument `type` has this value. */
struct sm_cmd_variant {
    const char *type;
    const struct sm_arg_spec *args;
    unsigned arg_count;
    int (*run)(struct sm_call *call);
};

struct sm_cmd {
    const char *name;   /* "memory.read" */
    const char *method; /* the Lua method: "read"; NULL: none */
    const char *doc;
    const struct sm_arg_spec *args; /* in the order of the method's arguments */
    unsigned arg_count;
    unsigned states; /* SM_IN_… in which it may be called */
    int (*run)(struct sm_call *call);
    const struct sm_cmd_variant *variants; /* instead of args and run; ends with type NULL */
};

#define SM_IN_EMPTY 1u /* no VM yet */
#define SM_IN_STATE(run_state) (2u << (run_state))
#define SM_IN_ANY (~SM_IN_EMPTY)

/* Every command; ends with name NULL. */
const struct sm_cmd *sm_cmd_table(void);
const struct sm_cmd *sm_cmd_find(const char *name, size_t len);

struct sm_cmd_error {
    int code;    /* -errno */
    bool misuse; /* the caller's mistake, not the world's refusal */
    char text[256];
};

struct sm_machine;

int sm_machine_create(struct sm_machine **out);
/* Stops the VM, joins its threads, frees everything. */
void sm_machine_destroy(struct sm_machine *m);

/*
 * Run a command. args: a checked message (sm_msg_check) that is a map, or nil
 * for none. The result is one value appended to out; nothing is appended when
 * it fails. 0 or err->code.
 */
int sm_machine_call(struct sm_machine *m, const char *name, size_t name_len,
                    const void *args, size_t args_len, struct sm_msg_writer *out,
                    struct sm_cmd_error *err);

/* A descriptor that came along with the next command, which may take it (it
 * then stands for the file of the argument `path`); what it leaves is closed
 * after it. How a confined worker gets at files it could not open. */
void sm_machine_pass_fd(struct sm_machine *m, int fd);

/* Append the next event as a message. 1: one was there; 0: none, and the fd
 * sleeps until there is; -errno: it does not fit (tried again later). */
int sm_machine_next_event(struct sm_machine *m, struct sm_msg_writer *out);
/* The same for exit events alone, which then come before all others. */
int sm_machine_next_exit(struct sm_machine *m, struct sm_msg_writer *out);
/* Readable when there are events; -1 before vm.create. */
int sm_machine_event_fd(const struct sm_machine *m);

/* How the process that holds this machine is confined, for vm.stats. */
struct sm_confinement {
    bool no_new_privs, limits, seccomp;
    int landlock; /* ABI, 0: none */
};
void sm_machine_set_confinement(struct sm_machine *m, const struct sm_confinement *c);
struct sm_vm;
struct sm_vm *sm_machine_vm(struct sm_machine *m); /* NULL before vm.create */

#endif
