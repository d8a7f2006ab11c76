/* What the daemon shares with the libraries beside it (shared.py), and how those are made to fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAGIC 0x64726163656B6166ULL
#define DEVICES 8
#define PROCESSES 64
#define SAMPLES 512
#define LIMITS 32
#define ASKS 64
#define READERS 32

struct process_state { uint32_t pid, mps; uint64_t memory, busy_ns; };
struct sample_state { uint64_t at_us; uint32_t pid, percent; };
struct limit_state { char group[256]; uint64_t soft, hard; }; /* the one part of a card that libraries write */
struct device_state {
  char uuid[96], name[96];
  uint64_t memory_total, memory_used, busy_ns, sm_ns, at_ns;
  uint32_t percent, mig, process_count, padding;
  uint64_t sample_count;
  uint32_t power_limit_mw, power_enforced_mw, power_least_mw, power_greatest_mw, power_mw, persistence; /* limit: written here */
  uint64_t energy_mj;
  struct process_state processes[PROCESSES];
  struct sample_state samples[SAMPLES];
  struct limit_state limits[LIMITS];
};
/* A question to the daemon that is answered when it is done. */
struct ask_state { volatile uint32_t stage; uint32_t verb, pid, result, timeout_ms, value; };
enum { FREE, FILLING, ASKED, DONE };
struct state {
  uint64_t magic;
  volatile uint64_t sequence;
  char driver[80];
  uint32_t device_count, memory_limits;
  uint32_t readers[READERS]; /* processes that have initialized NVML */
  struct ask_state asks[ASKS];
  struct device_state devices[DEVICES];
};

static struct state *shared;
static char folder[4096];

static void find_folder(void) {
  Dl_info found;
  if (folder[0] || !dladdr((void *)find_folder, &found)) return;
  snprintf(folder, sizeof folder, "%s", found.dli_fname);
  if (!strchr(folder, '/') && readlink("/proc/self/exe", folder, sizeof folder - 1) < 0) folder[0] = 0;
  char *slash = strrchr(folder, '/');
  if (slash) *slash = 0;
  else strcpy(folder, ".");
}

/* What the file `faults` wants of this function: a code, or 0. */
static int fault(const char *function) {
  char path[4200], line[256];
  find_folder();
  snprintf(path, sizeof path, "%s/faults", folder);
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  static struct { char function[80]; int calls; } counted[64];
  int code = 0;
  while (code == 0 && fgets(line, sizeof line, file)) {
    char name[80] = "", what[80] = "", word[80] = "";
    double seconds = 0;
    int after = 0;
    if (sscanf(line, "%79s %79s", name, what) < 2) continue;
    if (strcmp(name, "*") && strcmp(name, function)) continue;
    char *more = strstr(line, "after ");
    if (more) sscanf(more, "after %d", &after);
    if (after) {
      int i = 0;
      while (i < 63 && counted[i].function[0] && strcmp(counted[i].function, function)) i++;
      snprintf(counted[i].function, sizeof counted[i].function, "%s", function);
      if (counted[i].calls++ < after) continue;
    }
    if (!strcmp(what, "die")) {
      _exit(70);
    } else if (sscanf(line, "%*s %79s %lf", word, &seconds) == 2 && !strcmp(word, "hang")) {
      struct timespec pause = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
      nanosleep(&pause, NULL);
    } else {
      code = atoi(what);
    }
  }
  fclose(file);
  return code;
}

/* Whether the driver answers wrongly in this way. */
__attribute__((unused)) static int wrong(const char *how) {
  char path[4200], line[256];
  snprintf(path, sizeof path, "%s/faults", folder);
  FILE *file = fopen(path, "r");
  if (!file) return 0;
  int found = 0;
  while (!found && fgets(line, sizeof line, file)) found = !strncmp(line, how, strlen(how));
  fclose(file);
  return found;
}

/* The daemon's state; -1 where there is no daemon. */
static int attach(void) {
  char path[4200];
  find_folder();
  snprintf(path, sizeof path, "%s/state", folder);
  int descriptor = open(path, O_RDWR);
  if (descriptor < 0) descriptor = open(path, O_RDONLY);
  if (descriptor < 0) return -1;
  struct stat found;
  if (fstat(descriptor, &found) || (size_t)found.st_size < sizeof *shared) { close(descriptor); return -1; }
  void *memory = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) memory = mmap(NULL, sizeof *shared, PROT_READ, MAP_SHARED, descriptor, 0);
  close(descriptor);
  if (memory == MAP_FAILED) return -1;
  if (shared) munmap(shared, sizeof *shared);
  shared = memory;
  return shared->magic == MAGIC ? 0 : -1;
}

/* Ask the daemon for something and wait until it is done: a CUresult. */
enum { VERB_LOCK = 1, VERB_CHECKPOINT, VERB_RESTORE, VERB_UNLOCK, VERB_STATE, VERB_TERMINATE };
enum { NOT_INITIALIZED = 3, UNKNOWN_ERROR = 999 };
__attribute__((unused)) static int ask(const char *function, uint32_t verb, int pid, uint32_t timeout_ms, int *value) {
  int code = fault(function);
  if (code) return code;
  if (!shared) return NOT_INITIALIZED;
  for (int i = 0; i < ASKS; i++) {
    struct ask_state *slot = &shared->asks[i];
    if (!__sync_bool_compare_and_swap(&slot->stage, FREE, FILLING)) continue;
    slot->verb = verb, slot->pid = (uint32_t)pid, slot->timeout_ms = timeout_ms, slot->result = 0;
    __sync_synchronize();
    slot->stage = ASKED;
    while (slot->stage != DONE && shared->magic == MAGIC) {
      struct timespec pause = {0, 200000};
      nanosleep(&pause, NULL);
    }
    code = shared->magic == MAGIC ? (int)slot->result : UNKNOWN_ERROR;
    if (value) *value = (int)slot->value;
    slot->stage = FREE;
    return code;
  }
  return UNKNOWN_ERROR;
}
