/* NVML over the state that daemon.py writes: what nvidia-ml-py calls, for processes that share a fake card.
 *
 * The state lies beside this library. A call fails as a driver's would where the file `faults` beside it says so, a line
 * a fault: `FUNCTION CODE`, `FUNCTION hang SECONDS`, `FUNCTION die`, each with an optional `after N` calls. `*` is every
 * function.
 * Values that a driver answers wrongly: `memory-unknown`, `stale-samples`, `percent-wild`, `namespaced-pids`.
 * Structures and numbers: nvml.h of CUDA 13, as nvidia-ml-py 13.615 binds them.
 */
#include "state.h"

enum {
  OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25, UNKNOWN = 999
};

/* A whole picture of a card; handles are indices from one. */
static int look(const char *function, void *handle, struct device_state *copy) {
  int code = fault(function);
  if (code != OK) return code;
  if (!shared) return UNINITIALIZED;
  if (shared->magic != MAGIC) return GPU_IS_LOST;
  uintptr_t index = (uintptr_t)handle;
  if (index < 1 || index > shared->device_count) return INVALID_ARGUMENT;
  for (int tries = 0; tries < 100000; tries++) {
    uint64_t before = shared->sequence;
    __sync_synchronize();
    memcpy(copy, &shared->devices[index - 1], sizeof *copy);
    __sync_synchronize();
    if (!(before & 1) && before == shared->sequence) return OK;
  }
  return UNKNOWN;
}

#define LOOK(handle)                                   \
  struct device_state device;                          \
  int code = look(__func__, handle, &device);          \
  if (code != OK) return code

int nvmlInitWithFlags(unsigned int flags) {
  (void)flags;
  int code = fault(__func__);
  if (code != OK) return code;
  if (attach()) return DRIVER_NOT_LOADED;
  for (int i = 0; i < READERS; i++) {
    uint32_t me = (uint32_t)getpid();
    if (shared->readers[i] == me || __sync_bool_compare_and_swap(&shared->readers[i], 0, me)) break;
  }
  return OK;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
  for (int i = 0; shared && i < READERS; i++)
    if (shared->readers[i] == (uint32_t)getpid()) shared->readers[i] = 0;
  return OK;
}

const char *nvmlErrorString(int code) {
  switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
  }
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
  int code = fault(__func__);
  if (code != OK) return code;
  if (!shared) return UNINITIALIZED;
  snprintf(version, length, "%s", shared->driver);
  return OK;
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
  int code = fault(__func__);
  if (code != OK) return code;
  if (!shared) return UNINITIALIZED;
  *count = shared->magic == MAGIC ? shared->device_count : 0;
  return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
  int code = fault(__func__);
  if (code != OK) return code;
  if (!shared) return UNINITIALIZED;
  if (index >= shared->device_count) return INVALID_ARGUMENT;
  *handle = (void *)(uintptr_t)(index + 1);
  return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  int code = fault(__func__);
  if (code != OK) return code;
  if (!shared) return UNINITIALIZED;
  for (uint32_t i = 0; i < shared->device_count; i++)
    if (!strcmp(uuid, shared->devices[i].uuid)) { *handle = (void *)(uintptr_t)(i + 1); return OK; }
  return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned int length) {
  LOOK(handle);
  snprintf(text, length, "%s", device.uuid);
  return OK;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned int length) {
  LOOK(handle);
  snprintf(text, length, "%s", device.name);
  return OK;
}

struct memory { unsigned long long total, free, used; };
int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
  LOOK(handle);
  *memory = (struct memory){device.memory_total, device.memory_total - device.memory_used, device.memory_used};
  return OK;
}

struct utilization { unsigned int gpu, memory; };
int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *rates) {
  LOOK(handle);
  if (device.mig) return NOT_SUPPORTED;
  *rates = (struct utilization){device.percent, 0};
  return OK;
}

int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) {
  LOOK(handle);
  *current = *pending = device.mig;
  return OK;
}

int nvmlDeviceGetVirtualizationMode(void *handle, unsigned int *mode) {
  LOOK(handle);
  *mode = 0;
  return OK;
}

int nvmlDeviceGetPersistenceMode(void *handle, unsigned int *mode) {
  LOOK(handle);
  *mode = device.persistence;
  return OK;
}
int nvmlDeviceSetPersistenceMode(void *handle, unsigned int mode) {
  LOOK(handle);
  if (geteuid()) return NO_PERMISSION;
  if (mode > 1) return INVALID_ARGUMENT;
  shared->devices[(uintptr_t)handle - 1].persistence = mode;
  return OK;
}

/* Power, in mW: a limit outside of its constraints is refused, and nothing is clamped. */
int nvmlDeviceGetPowerManagementLimit(void *handle, unsigned int *limit) {
  LOOK(handle);
  *limit = device.power_limit_mw;
  return OK;
}
int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned int *limit) {
  LOOK(handle);
  *limit = device.power_enforced_mw;
  return OK;
}
int nvmlDeviceGetPowerManagementDefaultLimit(void *handle, unsigned int *limit) {
  LOOK(handle);
  *limit = device.power_greatest_mw;
  return OK;
}
int nvmlDeviceGetPowerManagementLimitConstraints(void *handle, unsigned int *least, unsigned int *greatest) {
  LOOK(handle);
  *least = device.power_least_mw, *greatest = device.power_greatest_mw;
  return OK;
}
int nvmlDeviceSetPowerManagementLimit(void *handle, unsigned int limit) {
  LOOK(handle);
  if (geteuid()) return NO_PERMISSION;
  if (limit < device.power_least_mw || limit > device.power_greatest_mw) return INVALID_ARGUMENT;
  shared->devices[(uintptr_t)handle - 1].power_limit_mw = limit;
  return OK;
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned int *power) {
  LOOK(handle);
  *power = device.power_mw;
  return OK;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy) {
  LOOK(handle);
  *energy = device.energy_mj;
  return OK;
}
enum { IDLE_REASON = 1, SW_POWER_CAP = 4 };
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
  LOOK(handle);
  if (!device.percent) *reasons = IDLE_REASON;
  else *reasons = device.power_enforced_mw < device.power_greatest_mw ? SW_POWER_CAP : 0;
  return OK;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons) {
  return nvmlDeviceGetCurrentClocksThrottleReasons(handle, reasons);
}

int nvmlDeviceGetComputeMode(void *handle, unsigned int *mode) {
  LOOK(handle);
  *mode = 0;
  return OK;
}

struct process_info { unsigned int pid; unsigned long long memory; unsigned int gpu_instance, compute_instance; };
static int processes(const char *function, void *handle, unsigned int *count, struct process_info *infos, uint32_t mps) {
  struct device_state device;
  int code = look(function, handle, &device);
  if (code != OK) return code;
  unsigned int found = 0, room = *count;
  int unknown = wrong("memory-unknown"), spaced = wrong("namespaced-pids");
  for (uint32_t i = 0; i < device.process_count && i < PROCESSES; i++) {
    if (device.processes[i].mps != mps) continue;
    if (found < room)
      infos[found] = (struct process_info){spaced ? found + 1 : device.processes[i].pid,
                                           unknown ? ~0ULL : device.processes[i].memory, ~0u, ~0u};
    found++;
  }
  *count = found;
  return found > room ? INSUFFICIENT_SIZE : OK;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *count, struct process_info *infos) {
  return processes(__func__, handle, count, infos, 0);
}
int nvmlDeviceGetMPSComputeRunningProcesses_v3(void *handle, unsigned int *count, struct process_info *infos) {
  return processes(__func__, handle, count, infos, 1);
}

struct process_utilization { unsigned int pid; unsigned long long time_us; unsigned int sm, memory, encoder, decoder; };
/* The newest sample of each process that is newer; NOT_FOUND where there is none. */
int nvmlDeviceGetProcessUtilization(void *handle, struct process_utilization *out, unsigned int *count,
                                    unsigned long long since_us) {
  LOOK(handle);
  if (device.mig) return NOT_SUPPORTED;
  int stale = wrong("stale-samples"), wild = wrong("percent-wild");
  struct process_utilization found[PROCESSES];
  unsigned int n = 0;
  uint64_t first = device.sample_count > SAMPLES ? device.sample_count - SAMPLES : 0;
  for (uint64_t i = device.sample_count; i > first; i--) {
    struct sample_state *sample = &device.samples[(i - 1) % SAMPLES];
    if (sample->at_us <= since_us) break;
    unsigned int j = 0;
    while (j < n && found[j].pid != sample->pid) j++;
    if (j < n || n == PROCESSES) continue;
    found[n++] = (struct process_utilization){sample->pid, sample->at_us, wild ? 4294967295u : sample->percent, 0, 0, 0};
  }
  if (!n && !stale) return NOT_FOUND;
  unsigned int wanted = n + (stale ? 100 : 0), room = *count;
  *count = wanted;
  if (wanted > room || !out) return INSUFFICIENT_SIZE;
  memcpy(out, found, n * sizeof *found);
  for (unsigned int i = n; i < wanted; i++) out[i] = (struct process_utilization){n ? found[0].pid : 1, 1 + i, 7, 0, 0, 0};
  return OK;
}

/* GPM: two looks at a counter; too close together they say nothing (measured: zeros below 100 ms). */
struct gpm_sample { uint64_t busy_ns, sm_ns, at_ns; };
int nvmlGpmSampleAlloc(struct gpm_sample **sample) {
  *sample = calloc(1, sizeof **sample);
  return *sample ? OK : UNKNOWN;
}
int nvmlGpmSampleFree(struct gpm_sample *sample) {
  free(sample);
  return OK;
}
int nvmlGpmSampleGet(void *handle, struct gpm_sample *sample) {
  LOOK(handle);
  *sample = (struct gpm_sample){device.busy_ns, device.sm_ns, device.at_ns};
  return OK;
}
struct gpm_support { unsigned int version, supported; };
int nvmlGpmQueryDeviceSupport(void *handle, struct gpm_support *support) {
  LOOK(handle);
  support->supported = !device.mig;
  return OK;
}
struct gpm_metric { unsigned int id; int result; double value; struct { char *a, *b, *c; } names; };
struct gpm_request { unsigned int version, count; struct gpm_sample *first, *second; struct gpm_metric metrics[]; };
enum { GPM_GRAPHICS_UTIL = 1, GPM_SM_UTIL = 2 }; /* of time; of the SMs */
int nvmlGpmMetricsGet(struct gpm_request *request) {
  int code = fault(__func__);
  if (code != OK) return code;
  double apart = (double)(request->second->at_ns - request->first->at_ns);
  double busy = (double)(request->second->busy_ns - request->first->busy_ns);
  double sms = (double)(request->second->sm_ns - request->first->sm_ns);
  for (unsigned int i = 0; i < request->count; i++) {
    struct gpm_metric *metric = &request->metrics[i];
    metric->result = metric->id == GPM_GRAPHICS_UTIL || metric->id == GPM_SM_UTIL ? OK : NOT_SUPPORTED;
    metric->value = apart < 99e6 ? 0.0 : 100.0 * (metric->id == GPM_SM_UTIL ? sms : busy) / apart;
    if (metric->value > 100.0) metric->value = 100.0;
  }
  return OK;
}

/* Memory limits of cgroups (r615). */
#define NO_LIMIT (~0ULL)
struct set_limits { const char *group; unsigned long long soft, hard; };
struct get_limits { const char *group; unsigned long long soft, hard, used; };
static struct limit_state *limit_of(void *handle, const char *group, int make) {
  struct device_state *device = &shared->devices[(uintptr_t)handle - 1];
  struct limit_state *empty = NULL;
  for (int i = 0; i < LIMITS; i++) {
    if (!strcmp(device->limits[i].group, group)) return &device->limits[i];
    if (!device->limits[i].group[0] && !empty) empty = &device->limits[i];
  }
  if (!make || !empty) return NULL;
  empty->soft = 0, empty->hard = NO_LIMIT;
  snprintf(empty->group, sizeof empty->group, "%s", group);
  return empty;
}
int nvmlDeviceSetMemoryLimits_v1(void *handle, struct set_limits *wanted) {
  LOOK(handle);
  if (device.mig || !shared->memory_limits) return NOT_SUPPORTED;
  if (geteuid()) return NO_PERMISSION;
  if (!wanted->group || !wanted->group[0] || wanted->soft > wanted->hard) return INVALID_ARGUMENT;
  struct limit_state *limit = limit_of(handle, wanted->group, 1);
  if (!limit) return UNKNOWN;
  limit->soft = wanted->soft, limit->hard = wanted->hard;
  if (!limit->soft && limit->hard == NO_LIMIT) limit->group[0] = 0;
  return OK;
}
int nvmlDeviceGetMemoryLimits_v1(void *handle, struct get_limits *found) {
  LOOK(handle);
  if (device.mig || !shared->memory_limits) return NOT_SUPPORTED;
  struct limit_state *limit = limit_of(handle, found->group, 0);
  found->soft = limit ? limit->soft : 0;
  found->hard = limit ? limit->hard : NO_LIMIT;
  found->used = 0;
  return OK;
}

unsigned long fakecard_state_bytes(void) { return sizeof(struct state); }
