"""World to NodeSnapshot: the only package besides `actuate` that looks at the kernel."""
