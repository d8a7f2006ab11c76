"""A plugin of a container runtime (containerd, CRI-O) by NRI, the Node Resource Interface; usable without the rest.

`Plugin` registers with the runtime and asks a `Handler` where a new container goes; `framing` is the protocol's bytes,
`messages` its words. Source: containerd/nri v0.12, `docs` and `pkg/api/api.proto`; containerd/ttrpc, PROTOCOL.md.
"""

from colocate.nri.framing import NotNri
from colocate.nri.messages import Adjustment, Container, Limits, Pod, Update
from colocate.nri.plugin import Handler, Plugin, Refused

__all__ = ["Adjustment", "Container", "Handler", "Limits", "NotNri", "Plugin", "Pod", "Refused", "Update"]
