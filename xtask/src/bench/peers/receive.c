/* receive SOCKET FOLDER: does below the folder what forward.c says, and answers each call when it is done. */
#define _GNU_SOURCE
#include "forward.h"
#include <err.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

/* Rises when a name may mean another file than before. */
static atomic_int names;

static int all(int from, void *room, size_t len) {
    for (char *at = room; len > 0;) {
        ssize_t got = recv(from, at, len, 0);
        if (got <= 0) return 0;
        at += got;
        len -= got;
    }
    return 1;
}

static void *serve(void *argument) {
    int from = (int)(long)argument, fd = -1, of_names = -1;
    char path[PATH_MAX], last[PATH_MAX] = "";
    char *bytes = NULL;
    size_t room = 0;
    struct head head;
    while (all(from, &head, sizeof head) && head.path_len < PATH_MAX && all(from, path, head.path_len)) {
        path[head.path_len] = 0;
        if (head.len + 1 > room) {
            room = head.len + 1;
            bytes = realloc(bytes, room);
            if (!bytes) err(1, "realloc");
        }
        if (!all(from, bytes, head.len)) break;
        bytes[head.len] = 0;
        int done = 0;
        if (head.what <= WRITE) {
            int now = atomic_load(&names), flags = head.what == TRUNCATE_OPEN ? O_TRUNC : 0;
            if (fd < 0 || now != of_names || strcmp(path, last) != 0 || flags) {
                if (fd >= 0) close(fd);
                fd = open(path, O_WRONLY | O_CREAT | flags, 0644);
                strcpy(last, path);
                of_names = now;
            }
            done = fd < 0 ? -1 : 0;
            if (head.what == WRITE && fd >= 0 && pwrite(fd, bytes, head.len, head.at) != (ssize_t)head.len) done = -1;
        } else {
            if (head.what == RENAME) done = rename(path, bytes);
            if (head.what == UNLINK) done = unlink(path);
            if (head.what == MKDIR) done = mkdir(path, head.at | 0700);
            if (head.what == RMDIR) done = rmdir(path);
            if (head.what == TRUNCATE) done = truncate(path, head.at);
            if (head.what == LINK) done = link(path, bytes);
            if (head.what == SYMLINK) done = symlink(bytes, path);
            if (head.what == RENAME || head.what == UNLINK) atomic_fetch_add(&names, 1);
        }
        if (done != 0) warn("call %u of %s", head.what, path);
        if (send(from, "", 1, MSG_NOSIGNAL) != 1) break;
    }
    if (fd >= 0) close(fd);
    free(bytes);
    close(from);
    return NULL;
}

int main(int count, char **words) {
    if (count != 3 || chdir(words[2]) != 0) errx(1, "usage: receive SOCKET FOLDER");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", words[1]);
    int at = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(at, (void *)&address, sizeof address) != 0 || listen(at, 64) != 0) err(1, "%s", words[1]);
    for (;;) {
        pthread_t thread;
        int from = accept(at, NULL, NULL);
        if (from < 0 || pthread_create(&thread, NULL, serve, (void *)(long)from) != 0) err(1, "accept");
        pthread_detach(thread);
    }
}
