/* SPDX-License-Identifier: Apache-2.0 */
/* The parts of the `lab` program, which works outside the lab machine. */
#ifndef LAB_LAB_H
#define LAB_LAB_H

int lab_connect(const char *socket_path); /* fd or -errno */
int keep_main(int argc, char **argv);     /* keep.c: owns one machine */
int run_main(int argc, char **argv);      /* run.c: one command */

#endif
