# A worker without GPU: code, models and data of fedlora. PyTorch's index of CPU builds makes it gigabytes smaller:
#   docker build -f deployments/docker/worker-cpu.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=… .
FROM python:3.11.13-slim-bookworm

ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    FEDLORA_HOME=/var/lib/fedlora FEDLORA_SOURCE=/opt/fedlora PREFECT_WORKER_QUERY_SECONDS=2 \
    PREFECT_WORKER_WEBSERVER_HOST=127.0.0.1 PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 \
    OMP_WAIT_POLICY=PASSIVE MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1

WORKDIR /opt/fedlora
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE CHANGELOG.md ./
COPY fedlora ./fedlora
COPY mlflow_tracking ./mlflow_tracking
COPY tasks ./tasks
COPY flows ./flows
COPY fedlora_cli ./fedlora_cli
COPY deployments ./deployments
RUN pip install -c constraints.txt -e . \
 && useradd --system --uid 10001 --user-group --home-dir /var/lib/fedlora --create-home fedlora

USER 10001:10001
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
CMD ["prefect", "worker", "start", "--type", "process", "--pool", "cpu-workers", "--with-healthcheck"]
