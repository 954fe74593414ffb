"""A Ray cluster of a head and two machines on this one. Prints its address; each line that it reads takes a machine."""

import sys

from ray.cluster_utils import Cluster

COMMON = {"include_dashboard": False, "object_store_memory": 80_000_000}


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **COMMON})
    machines = [cluster.add_node(num_cpus=1, wait=False, **COMMON) for _ in range(2)]
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(machines.pop(), allow_graceful=False)
        print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
