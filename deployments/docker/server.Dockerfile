# The Prefect server. Build from the root of the repository: docker build -f deployments/docker/server.Dockerfile .
FROM python:3.11.13-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    PREFECT_HOME=/var/lib/prefect PREFECT_UI_STATIC_DIRECTORY=/var/lib/prefect/ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 \
    PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED=true PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED=true

COPY constraints.txt /tmp/constraints.txt
RUN pip install -c /tmp/constraints.txt "prefect>=3.8.8,<4" "fastapi>=0.139,<0.151" "asyncpg>=0.30,<1" \
 && useradd --system --uid 10001 --user-group --home-dir /var/lib/prefect --create-home prefect

USER 10001:10001
WORKDIR /var/lib/prefect
EXPOSE 4200
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:4200/api/health', timeout=4)"]
CMD ["prefect", "server", "start", "--host", "0.0.0.0", "--port", "4200"]
