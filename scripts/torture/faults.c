/* Makes calls on files below a directory fail, for LD_PRELOAD.

   FAULT_DIR: the directory. FAULT_COUNT: a file of 8 bytes, the number of calls so far. FAULT_AT:
   number of the first call that fails, from 1; 0: none. FAULT_LAST: number of the last one.
   FAULT_ERRNO: the error. They are read at every call, because a process sets them after its
   start. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static int below(const char *path) {
    const char *dir = getenv("FAULT_DIR");
    return dir && *dir && path && strncmp(path, dir, strlen(dir)) == 0;
}

static int below_fd(int fd) {
    char link[64], path[4096];
    if (!getenv("FAULT_DIR")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0) return 0;
    path[n] = 0;
    return below(path);
}

static volatile uint64_t *counter(void) {
    static char known[4096];
    static volatile uint64_t *at;
    const char *name = getenv("FAULT_COUNT");
    if (!name) return NULL;
    if (at && strcmp(known, name) == 0) return at;
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int fd = real(name, O_RDWR);
    if (fd < 0) return NULL;
    void *page = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page == MAP_FAILED) return NULL;
    strncpy(known, name, sizeof known - 1);
    return at = page;
}

static int fails(void) {
    volatile uint64_t *at = counter();
    if (!at) return 0;
    uint64_t now = __atomic_add_fetch(at, 1, __ATOMIC_SEQ_CST);
    const char *first = getenv("FAULT_AT"), *last = getenv("FAULT_LAST"), *no = getenv("FAULT_ERRNO");
    uint64_t a = first ? strtoull(first, NULL, 10) : 0, b = last ? strtoull(last, NULL, 10) : 0;
    if (!a || now < a || now > b) return 0;
    errno = no ? atoi(no) : ENOSPC;
    return 1;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define BY_FD(type, name, params, args) \
    type name params { REAL(name); if (below_fd(fd) && fails()) return -1; return real args; }
#define BY_PATH(name, params, args, path) \
    int name params { REAL(name); if (below(path) && fails()) return -1; return real args; }
#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); va_list ap; va_start(ap, flags); mode_t mode = va_arg(ap, mode_t); va_end(ap); \
        if ((flags & (O_WRONLY | O_RDWR)) && below(path) && fails()) return -1; \
        return real(path, flags, mode); }
#define OPENS_AT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(name); va_list ap; va_start(ap, flags); mode_t mode = va_arg(ap, mode_t); va_end(ap); \
        if ((flags & (O_WRONLY | O_RDWR)) && below(path) && fails()) return -1; \
        return real(dir, path, flags, mode); }

OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
BY_FD(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
BY_FD(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n))
BY_FD(ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
BY_FD(ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
BY_FD(int, fsync, (int fd), (fd))
BY_FD(int, fdatasync, (int fd), (fd))
BY_FD(int, ftruncate, (int fd, off_t n), (fd, n))
BY_FD(int, ftruncate64, (int fd, off64_t n), (fd, n))
BY_PATH(rename, (const char *from, const char *to), (from, to), to)
BY_PATH(link, (const char *from, const char *to), (from, to), to)
BY_PATH(mkdir, (const char *path, mode_t mode), (path, mode), path)
