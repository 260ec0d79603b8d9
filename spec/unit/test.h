/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The smallest test harness that can fail: CHECK counts, TEST names, and
 * test_report() prints the `N passed, N failed` line the runner adds up.
 * One program per file, one process per program; a crash counts as a failure
 * of the whole program, which the runner sees by its exit code.
 */
#ifndef SM_TEST_H
#define SM_TEST_H

#include <stdio.h>
#include <string.h>

static int test_passed, test_failed, test_bad;

#define CHECK(cond)                                                            \
    do {                                                                       \
        if (!(cond)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond); \
            test_bad = 1;                                                      \
        }                                                                      \
    } while (0)

#define CHECK_EQ(a, b)                                                           \
    do {                                                                         \
        long long a_ = (long long)(a), b_ = (long long)(b);                      \
        if (a_ != b_) {                                                          \
            fprintf(stderr, "%s:%d: failed: %s == %s (%lld, %lld)\n", __FILE__,  \
                    __LINE__, #a, #b, a_, b_);                                   \
            test_bad = 1;                                                        \
        }                                                                        \
    } while (0)

/* Run one test function; a test passes when none of its CHECKs failed. */
#define TEST(fn)                                     \
    do {                                             \
        test_bad = 0;                                \
        fn();                                        \
        if (test_bad) {                              \
            test_failed++;                           \
            fprintf(stderr, "not ok: %s\n", #fn);    \
        } else {                                     \
            test_passed++;                           \
            fprintf(stderr, "ok: %s\n", #fn);        \
        }                                            \
    } while (0)

static inline int test_report(void)
{
    printf("%d passed, %d failed\n", test_passed, test_failed);
    return test_failed ? 1 : 0;
}

#endif
