"""Machines in processes of their own: templates, the zygotes that hold one restored, and the workers forked from them.

A zygote is a process that has modules, engine and a template in memory, its guest warm and standing still, and not one
thread. It forks a worker for each sandbox that is asked for; a worker runs one machine and hands out connections to its
guest as descriptors. What happens to one worker happens to no other, and to nobody who asked for it.
"""
