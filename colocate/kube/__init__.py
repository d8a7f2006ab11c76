"""The shell to an API server: transport, watches and leadership. Objects are the lean structs of `colocate.objects`."""
