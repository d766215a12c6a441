# The MLflow server. Build from the root of the repository: docker build -f deployments/docker/tracking.Dockerfile .
FROM python:3.11.13-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    MLFLOW_ARTIFACTS_DESTINATION=/var/lib/mlflow/artifacts MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1

COPY constraints.txt /tmp/constraints.txt
RUN pip install -c /tmp/constraints.txt "mlflow>=3.16,<4" "fastapi>=0.139,<0.151" "psycopg2-binary>=2.9,<3" \
 && useradd --system --uid 10001 --user-group --home-dir /var/lib/mlflow --create-home mlflow \
 && install -d -o mlflow -g mlflow /var/lib/mlflow/artifacts

USER 10001:10001
WORKDIR /var/lib/mlflow
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5000/health', timeout=4)"]
CMD ["mlflow", "server", "--host", "0.0.0.0", "--port", "5000", "--workers", "2"]
