# authbackend as a container: not root, and nothing in it that the service does not need.
#   docker build --tag authbackend .
#   docker run --rm authbackend --help
# What it needs to serve: AUTHBACKEND_DATABASE__DSN and the three AUTHBACKEND_BROKER__TLS__... files. See docs/operations.md.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /source
# The tool that packs it, pinned here because constraints.txt holds what runs and what tests, not what packs; in an
# environment that stays behind in this stage.
COPY constraints.txt ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --constraint constraints.txt hatchling==1.33.0
# Without pip inside: what is copied from here to the image below can run authbackend and install nothing.
RUN python -m venv --without-pip /opt/authbackend
# Dependencies first, each in the version that the tests ran with: this layer is kept while only the code changes.
# --only-binary: wheels alone, so that no compiler is ever needed, and a missing wheel is an error here.
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
      >/tmp/dependencies.txt \
 && /opt/build/bin/pip --python /opt/authbackend/bin/python install --only-binary :all: --constraint constraints.txt \
      --requirement /tmp/dependencies.txt
# The package itself; pyproject.toml puts sql/ inside it.
COPY README.md LICENSE ./
COPY authbackend ./authbackend
COPY authbackend_load ./authbackend_load
COPY sql ./sql
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheels . \
 && /opt/build/bin/pip --python /opt/authbackend/bin/python install --no-deps /tmp/wheels/authbackend-*.whl \
 && /opt/authbackend/bin/authbackend --version

FROM python:3.13-slim
# A number as well as a name, so that Kubernetes can check runAsNonRoot. It owns nothing but the place
# for a copy of the registry, which a volume mounted there takes over.
RUN groupadd --gid 10001 authbackend \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin authbackend \
 && install --directory --owner=10001 --group=10001 --mode=700 /var/lib/authbackend
COPY --from=build /opt/authbackend /opt/authbackend
COPY deploy/healthcheck /usr/local/bin/healthcheck
# USER: the commands note who acts, and must have a name to note under any user id.
ENV PATH=/opt/authbackend/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=authbackend \
    AUTHBACKEND_BROKER__LISTEN=0.0.0.0:8080 \
    AUTHBACKEND_HEALTH__LISTEN=0.0.0.0:8082
USER 10001:10001
# 8080: RabbitMQ asks here; refuses to start without mutual TLS. 8082: health, metrics and revocation lists, for balancers,
# Prometheus and brokers' hosts; keep it inside. The listener for people (8081) stays on the container's loopback.
EXPOSE 8080 8082
# "Live", not "ready": a database that is away makes no container sick; whoever spreads the load looks at /health/ready.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-I", "-S", "/usr/local/bin/healthcheck"]
ENTRYPOINT ["authbackend"]
CMD ["serve"]
