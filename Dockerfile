# One image for server, worker and command line, with and without a GPU:
#   docker build -t nightschool .
#   docker run --gpus all -p 8300:8300 -v $(pwd)/models:/app/models nightschool
# Without a GPU leave `--gpus all` out; TORCH_INDEX names an index with a build of torch for CPUs, which is smaller.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
ARG EXTRAS="postgres,gguf,cpu,qlora,mcp"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/nightschool
WORKDIR /src
COPY constraints.txt ./
# Alone and first: it is most of the image, and changes least.
RUN /opt/nightschool/bin/pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN /opt/nightschool/bin/pip install -c constraints.txt ".[${EXTRAS}]"

FROM python:3.11-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 nightschool \
    && useradd --uid 10001 --gid 10001 --home-dir /app --shell /usr/sbin/nologin nightschool \
    && install -d -o 10001 -g 10001 /app /app/models
COPY --from=build /opt/nightschool /opt/nightschool
COPY deploy/entrypoint.sh /usr/local/bin/entrypoint
COPY --chown=10001:10001 recipes /app/recipes
# The home and what comes from the hub lie in one volume; the home has what no other container may lose.
ENV PATH=/opt/nightschool/bin:$PATH \
    HOME=/app \
    NIGHTSCHOOL_HOME=/app/models/home \
    HF_HOME=/app/models/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
VOLUME /app/models
EXPOSE 8300
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8300/healthz', timeout=4)"]
# tini takes care of the processes that outlive the one that started them, such as an uploader.
ENTRYPOINT ["tini", "--", "entrypoint"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8300", "--with-worker"]
