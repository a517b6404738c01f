# The server in a container, on a CPU: docs/server.md#docker. For a GPU of NVIDIA:
#     docker build --build-arg PYTORCH=https://download.pytorch.org/whl/cu130 -t evoprune .
FROM python:3.11-slim AS build
ARG PYTORCH=https://download.pytorch.org/whl/cpu
# evoprune compiles its products for CPUs when it is installed.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY . /source
RUN sh /source/plugins/serve/install.sh /opt/evoprune "$PYTORCH"

FROM python:3.11-slim
ARG PYTORCH=https://download.pytorch.org/whl/cpu
# Triton needs a C compiler to build its kernel launchers.
RUN case "$PYTORCH" in */cpu) ;; *) apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* ;; esac
COPY --from=build /opt/evoprune /opt/evoprune
RUN useradd --uid 10001 --create-home evoprune && install -d -o evoprune /home/evoprune/.cache
USER evoprune
WORKDIR /home/evoprune
ENV PATH=/opt/evoprune/bin:$PATH
EXPOSE 8000
# The start period ends with the first success, but the first start may download a model.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30m CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=5); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["evoprune", "serve", "--host", "0.0.0.0"]
