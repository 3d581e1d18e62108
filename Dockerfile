# The image of every Airflow service in docker-compose.yml: the scheduler's side, without torch.
ARG PYTHON_VERSION=3.11
FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /source
# The versions first: this layer survives changes of the code.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY checkpointing ./checkpointing
COPY operators ./operators
COPY plugins ./plugins
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[airflow,cluster]"

FROM python:${PYTHON_VERSION}-slim
# tini reaps the processes that tasks leave behind.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 50000 --create-home --home-dir /opt/airflow airflow \
 && install --directory --owner airflow /opt/airflow/dags /opt/airflow/logs /opt/airflow/auth
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    AIRFLOW_HOME=/opt/airflow \
    PYTHONUNBUFFERED=1
USER airflow
WORKDIR /opt/airflow
ENTRYPOINT ["tini", "-g", "--"]
CMD ["airflow", "version"]
