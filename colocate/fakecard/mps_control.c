/* nvidia-cuda-mps-control of a fake card under MPS, as far as it ends clients: commands on standard input.
 * Source: NVIDIA's MPS documentation. A client that is killed instead may fault all others of its server.
 */
#include "state.h"

#define SERVER 4242

int main(void) {
  char line[256];
  if (attach()) {
    puts("Cannot find MPS control daemon process");
    return 1;
  }
  while (fgets(line, sizeof line, stdin)) {
    int server = 0, pid = 0;
    if (!strncmp(line, "get_server_list", 15)) {
      printf("%d\n", SERVER);
    } else if (sscanf(line, "get_client_list %d", &server) == 1 && server == SERVER) {
      for (uint32_t i = 0; i < shared->device_count && i < DEVICES; i++)
        for (uint32_t j = 0; j < shared->devices[i].process_count && j < PROCESSES; j++)
          if (shared->devices[i].processes[j].mps) printf("%u\n", shared->devices[i].processes[j].pid);
    } else if (sscanf(line, "terminate_client %d %d", &server, &pid) == 2 && server == SERVER) {
      int code = ask("terminate_client", VERB_TERMINATE, pid, 0, NULL);
      if (code) printf("error %d\n", code);
    } else if (!strncmp(line, "quit", 4)) {
      return 0;
    } else {
      puts("unknown command");
    }
  }
  return 0;
}
