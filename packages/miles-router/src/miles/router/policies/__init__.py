"""Policies: which worker gets a request.

A policy is a class made once with the router's settings; ``miles.router_policies`` entry points name them.
"""

from miles.router.policies.protocols import Policy, RoutableRequest, RoutableWorker, W

__all__ = ["Policy", "RoutableRequest", "RoutableWorker", "W"]
