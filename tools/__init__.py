"""What developers need beside the project: the guest image."""
