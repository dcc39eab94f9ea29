"""A cluster of two nodes without GPUs, as a file of conf/cluster has it, to which tests add cores and SLURM's part."""

TWO_NODES = """
gpu: none
peak_bf16_tflops: 1.0
memory_gib: 8.0
gpus_per_node: 1
nodes: 2
node_bandwidth_gbps: 10.0
usd_per_gpu_hour: 0.0
mfu: 0.5
"""
