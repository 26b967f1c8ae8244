# The image of a Ray cluster on Kubernetes: the package's image (see the Dockerfile at the top) with Ray and its dashboard.
#   docker build -t tahoex1:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker build -t REGISTRY/tahoex1-ray:TAG -f examples/launch/ray.Dockerfile .
FROM tahoex1:cuda
USER root
# The version of every machine of a cluster, and of rayVersion in rayjob.yaml. The dashboard takes the jobs in.
RUN pip install --no-cache-dir 'ray[data,default]==2.60.0'
USER tahoex1
# KubeRay starts Ray by a command of its own.
ENTRYPOINT []
