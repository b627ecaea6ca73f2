# syntax=docker/dockerfile:1
# One image for every service: `python -m router`, `python -m prefill_svc`, `python -m decode_svc`.
# PIP_OPTIONS takes an index with a CPU build of torch where the GPU libraries are not wanted.

FROM python:3.11-slim-bookworm AS build
ARG PIP_OPTIONS=""
WORKDIR /opt/legato
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY legato/__init__.py legato/__init__.py
RUN pip install --no-cache-dir $PIP_OPTIONS --constraint constraints.txt --editable '.[serve]'

FROM python:3.11-slim-bookworm
# The CPU kernels are compiled for the machine they run on, once, at first start.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home legato && mkdir -p /home/legato/.cache/legato && chown -R legato /home/legato
COPY --from=build /opt/venv /opt/venv
COPY . /opt/legato
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/legato
USER legato
CMD ["legato", "--help"]
