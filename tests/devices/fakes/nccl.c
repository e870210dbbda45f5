/* A stand-in for libnccl.so.2: a communicator of two is a socket of this machine; what is sent and received is put on the stream that
 * it is asked for on, and done there.
 *
 * As NCCL's, its ends match by order alone, do nothing until both are there, and wait for each other for good: who waits in vain has
 * to abort. Faults that tests ask for, each once a process: FAKE_NCCL=hang-join, hang-at:N, fail-at:N, die-at:N, flip-at:N, where N counts the
 * pieces that this process sends or receives, from 1. */
#define _GNU_SOURCE
#include "fake.h"
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6, IN_PROGRESS = 7 };
#define LOOK 10 /* ms between two looks whether a communicator was aborted */

typedef struct { char name[128]; } ncclUniqueId;
struct listening { char name[128]; int socket; struct listening *next; };
static struct listening *listenings;
static pthread_mutex_t all = PTHREAD_MUTEX_INITIALIZER;

/* What the communicators of one process add together. */
struct group {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int ranks, came, left;
    long round;
    float **parts;
};

struct comm {
    struct group *group;
    ncclUniqueId id;
    int rank, socket;
    atomic_int state, aborted, references;
};

/* The number of the fault, if it is the one that is asked for; 0 if it is another. */
static long fault(const char *kind) {
    const char *asked = getenv("FAKE_NCCL");
    size_t length = strlen(kind);
    if (!asked || strncmp(asked, kind, length))
        return 0;
    return asked[length] == ':' ? atol(asked + length + 1) : 1;
}

static struct sockaddr_un address(const char *name, socklen_t *length) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    /* No file: a name of the kernel's, after a zero. */
    size_t bytes = strlen(name);
    if (bytes > sizeof to.sun_path - 1)
        bytes = sizeof to.sun_path - 1;
    memcpy(to.sun_path + 1, name, bytes);
    *length = offsetof(struct sockaddr_un, sun_path) + 1 + bytes;
    return to;
}

int ncclGetVersion(int *version) {
    *version = 22809;
    return SUCCESS;
}

const char *ncclGetErrorString(int error) {
    return error == SYSTEM_ERROR ? "unhandled system error" : error == REMOTE_ERROR ? "remote process exited or there was a network error" : "invalid argument";
}

int ncclGetUniqueId(ncclUniqueId *id) {
    static atomic_int number;
    memset(id, 0, sizeof *id);
    snprintf(id->name, sizeof id->name, "overfill-nccl-%d-%d", getpid(), number++);
    socklen_t length;
    struct sockaddr_un at = address(id->name, &length);
    struct listening *made = calloc(1, sizeof *made);
    memcpy(made->name, id->name, sizeof made->name);
    made->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (bind(made->socket, (struct sockaddr *)&at, length) || listen(made->socket, 1))
        return SYSTEM_ERROR;
    pthread_mutex_lock(&all);
    made->next = listenings;
    listenings = made;
    pthread_mutex_unlock(&all);
    return SUCCESS;
}

static void let_go(struct comm *comm) {
    if (--comm->references == 0)
        free(comm);
}

/* Waits until a socket can be read or written; 0 where the communicator was aborted. */
static int ready(struct comm *comm, int socket, short what) {
    while (!comm->aborted) {
        struct pollfd look = {socket, what, 0};
        if (poll(&look, 1, LOOK) > 0)
            return 1;
    }
    return 0;
}

static void *join(void *of) {
    struct comm *comm = of;
    int made = -1;
    if (fault("hang-join"))
        while (!comm->aborted)
            usleep(LOOK * 1000);
    if (comm->rank == 0) {
        struct listening *found = NULL;
        pthread_mutex_lock(&all);
        for (struct listening **at = &listenings; *at; at = &(*at)->next)
            if (!strcmp((*at)->name, comm->id.name)) {
                found = *at;
                *at = found->next;
                break;
            }
        pthread_mutex_unlock(&all);
        if (found) {
            if (ready(comm, found->socket, POLLIN))
                made = accept4(found->socket, NULL, NULL, SOCK_CLOEXEC);
            close(found->socket);
            free(found);
        }
    } else {
        socklen_t length;
        struct sockaddr_un to = address(comm->id.name, &length);
        while (!comm->aborted) {
            made = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (!connect(made, (struct sockaddr *)&to, length))
                break;
            close(made);
            made = -1;
            usleep(LOOK * 1000);
        }
    }
    comm->socket = made;
    comm->state = made < 0 ? SYSTEM_ERROR : SUCCESS;
    let_go(comm);
    return NULL;
}

int ncclCommInitRankConfig(struct comm **made, int ranks, ncclUniqueId id, int rank, const int *config) {
    /* blocking is the field after size, magic and version */
    if (ranks != 2 || config[4] != 0)
        return INVALID_ARGUMENT;
    struct comm *comm = calloc(1, sizeof *comm);
    comm->id = id;
    comm->rank = rank;
    comm->socket = -1;
    comm->state = IN_PROGRESS;
    comm->references = 2;
    fake_counts()->communicators++;
    pthread_t thread;
    pthread_create(&thread, NULL, join, comm);
    pthread_detach(thread);
    *made = comm;
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(struct comm *comm, int *state) {
    *state = comm->state;
    return SUCCESS;
}

int ncclCommAbort(struct comm *comm) {
    struct counts *counts = fake_counts();
    comm->aborted = 1;
    /* What is under way ends first, as kernels do that are told to. */
    while (comm->references > 1)
        usleep(1000);
    if (comm->socket >= 0)
        close(comm->socket);
    counts->communicators--;
    counts->aborted++;
    let_go(comm);
    return SUCCESS;
}

struct piece { struct comm *comm; char *at; size_t bytes; int sends; };

static void move(void *argument) {
    struct piece *piece = argument;
    struct comm *comm = piece->comm;
    static atomic_long number;
    long mine = ++number;
    if (fault("hang-at") && mine >= fault("hang-at"))
        while (!comm->aborted)
            usleep(LOOK * 1000);
    if (mine == fault("fail-at"))
        comm->state = SYSTEM_ERROR;
    if (mine == fault("die-at"))
        _exit(9);
    if (mine == fault("flip-at"))
        piece->at[piece->bytes / 3] ^= 1;
    size_t done = 0;
    while (done < piece->bytes && comm->state == SUCCESS && ready(comm, comm->socket, piece->sends ? POLLOUT : POLLIN)) {
        ssize_t moved = piece->sends ? send(comm->socket, piece->at + done, piece->bytes - done, MSG_NOSIGNAL | MSG_DONTWAIT)
                                     : recv(comm->socket, piece->at + done, piece->bytes - done, MSG_DONTWAIT);
        if (moved > 0)
            done += moved;
        else if (moved == 0 || (errno != EAGAIN && errno != EINTR))
            comm->state = REMOTE_ERROR;
    }
    /* Without its end it never ends, until it is aborted. */
    while (done < piece->bytes && !comm->aborted)
        usleep(LOOK * 1000);
    if (done == piece->bytes)
        (piece->sends ? &fake_counts()->sent : &fake_counts()->received)[0]++;
    let_go(comm);
    free(piece);
}

static int piece(void *at, size_t bytes, int peer, struct comm *comm, void *stream, int sends) {
    if (peer != 1 - comm->rank || comm->state == IN_PROGRESS)
        return INVALID_ARGUMENT;
    struct piece *made = malloc(sizeof *made);
    *made = (struct piece){comm, at, bytes, sends};
    comm->references++;
    fake_enqueue(stream, move, made);
    return SUCCESS;
}

int ncclSend(const void *from, size_t count, int type, int peer, struct comm *comm, void *stream) {
    (void)type;
    return piece((void *)from, count, peer, comm, stream, 1);
}

int ncclRecv(void *to, size_t count, int type, int peer, struct comm *comm, void *stream) {
    (void)type;
    return piece(to, count, peer, comm, stream, 0);
}

/* Sums: each stream waits for the others', then has the sum of what all brought, in the order of their ranks. */
int ncclCommInitAll(struct comm **made, int ranks, const int *devices) {
    (void)devices;
    struct group *group = calloc(1, sizeof *group);
    pthread_mutex_init(&group->lock, NULL);
    pthread_cond_init(&group->changed, NULL);
    group->ranks = ranks;
    group->parts = calloc(ranks, sizeof *group->parts);
    for (int rank = 0; rank < ranks; rank++) {
        made[rank] = calloc(1, sizeof **made);
        made[rank]->group = group;
        made[rank]->rank = rank;
        made[rank]->socket = -1;
        made[rank]->references = 1;
        fake_counts()->communicators++;
    }
    return SUCCESS;
}

int ncclGroupStart(void) {
    return SUCCESS;
}

int ncclGroupEnd(void) {
    return SUCCESS;
}

struct sum { struct comm *comm; float *numbers; size_t count; };

static void add(void *argument) {
    struct sum *sum = argument;
    struct group *group = sum->comm->group;
    pthread_mutex_lock(&group->lock);
    /* The last round is over when all have left it. */
    while (group->left)
        pthread_cond_wait(&group->changed, &group->lock);
    group->parts[sum->comm->rank] = malloc(sum->count * sizeof(float));
    memcpy(group->parts[sum->comm->rank], sum->numbers, sum->count * sizeof(float));
    long round = group->round;
    if (++group->came == group->ranks) {
        group->came = 0;
        group->left = group->ranks;
        group->round++;
        pthread_cond_broadcast(&group->changed);
    }
    while (group->round == round)
        pthread_cond_wait(&group->changed, &group->lock);
    for (size_t i = 0; i < sum->count; i++) {
        sum->numbers[i] = 0;
        for (int rank = 0; rank < group->ranks; rank++)
            sum->numbers[i] += group->parts[rank][i];
    }
    if (--group->left == 0) {
        for (int rank = 0; rank < group->ranks; rank++)
            free(group->parts[rank]);
        pthread_cond_broadcast(&group->changed);
    }
    pthread_mutex_unlock(&group->lock);
    let_go(sum->comm);
    free(sum);
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, struct comm *comm, void *stream) {
    if (type != 7 || operation != 0 || from != to)
        return INVALID_ARGUMENT;
    struct sum *sum = malloc(sizeof *sum);
    *sum = (struct sum){comm, to, count};
    comm->references++;
    fake_enqueue(stream, add, sum);
    return SUCCESS;
}
