/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that sends what it likes: frames from standard input, each behind its length
 * (u16, little-endian), out of a network card as they are.
 *
 *   rawsend CARD < FRAMES
 */
#include <net/ethernet.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

static int take(uint8_t *p, size_t len)
{
    while (len) {
        ssize_t n = read(0, p, len);

        if (n <= 0)
            return -1;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

int main(int argc, char **argv)
{
    static uint8_t frame[65536];
    struct sockaddr_ll to = { .sll_family = AF_PACKET };
    uint8_t head[2];
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    to.sll_ifindex = argc > 1 ? (int)if_nametoindex(argv[1]) : 0;
    if (fd < 0 || !to.sll_ifindex) {
        fputs("usage: rawsend CARD < FRAMES\n", stderr);
        return 2;
    }
    while (take(head, sizeof(head)) == 0) {
        size_t len = (size_t)head[0] | (size_t)head[1] << 8;

        if (take(frame, len) < 0)
            return 2;
        if (sendto(fd, frame, len, 0, (struct sockaddr *)&to, sizeof(to)) < 0) {
            perror("sendto");
            return 1;
        }
        usleep(2000);
    }
    return 0;
}
