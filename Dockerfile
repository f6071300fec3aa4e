# One image for every service: `hearth gateway|scheduler|store|worker` and the command line. docs/compose.md explains
# the arguments. Layers from the rarest change to the most frequent: torch, the other packages, the project.

ARG PYTHON_IMAGE=python:3.11-slim

# Wheels that pip shall prefer, such as a CPU build of torch: `--build-context wheels=DIR` replaces this empty stage.
FROM scratch AS wheels

# What to install, read from pyproject.toml. Later layers depend on these files' content only, so that another change of
# pyproject.toml (a linter's setting) installs nothing again.
FROM ${PYTHON_IMAGE} AS requirements
COPY pyproject.toml /
RUN python - <<'PYTHON'
import pathlib, tomllib

project = tomllib.loads(pathlib.Path("/pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
wanted = sorted({*project["dependencies"], *extras["store"], *extras["worker"]})
torch = [line for line in wanted if line.startswith("torch")]
pathlib.Path("/torch.txt").write_text("\n".join(torch) + "\n")
pathlib.Path("/requirements.txt").write_text("\n".join(line for line in wanted if line not in torch) + "\n")
PYTHON

# The project as it lies in the image: readable for everybody whatever the umask of the checkout, compiled once.
FROM ${PYTHON_IMAGE} AS project
COPY examples /opt/hearth/examples
COPY shared /opt/hearth/shared
COPY services /opt/hearth/services
RUN chmod -R a+rX /opt/hearth && python -m compileall -q /opt/hearth/shared /opt/hearth/services

FROM ${PYTHON_IMAGE}
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore HF_HUB_DISABLE_TELEMETRY=1

# More places where pip may look; empty: only its usual index.
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""

RUN --mount=type=bind,from=requirements,source=/torch.txt,target=/tmp/torch.txt \
    --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    --mount=type=bind,from=wheels,target=/wheels \
    pip install --find-links /wheels -c /tmp/constraints.txt -r /tmp/torch.txt

RUN --mount=type=bind,from=requirements,source=/requirements.txt,target=/tmp/requirements.txt \
    --mount=type=bind,source=constraints.txt,target=/tmp/constraints.txt \
    --mount=type=bind,from=wheels,target=/wheels \
    pip install --find-links /wheels -c /tmp/constraints.txt -r /tmp/requirements.txt

# The user of every service. The directories exist with its ownership, so that empty volumes take it over.
RUN groupadd --gid 10001 hearth \
 && useradd --uid 10001 --gid hearth --home-dir /var/lib/hearth --no-create-home --shell /usr/sbin/nologin hearth \
 && install -d -o hearth -g hearth -m 0750 /var/lib/hearth /var/lib/hearth/store \
 && printf '#!/bin/sh\nexec python -P -m services "$@"\n' > /usr/local/bin/hearth \
 && chmod 0755 /usr/local/bin/hearth \
 && python -c "import sysconfig; print('/opt/hearth', file=open(sysconfig.get_path('purelib') + '/hearth.pth', 'w'))"

COPY --from=project /opt/hearth /opt/hearth

USER hearth
WORKDIR /var/lib/hearth
ENTRYPOINT ["hearth"]
CMD ["--help"]
