"""What is known of the cluster: nodes, pods and what each holds, in arrays."""
