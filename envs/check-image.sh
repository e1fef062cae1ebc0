#!/usr/bin/env bash
# Takes the steps of envs/Dockerfile without an engine, as root, in a Debian that debootstrap makes in FOLDER, which
# takes 8 GB, and makes a part of the smoke run there: envs/check-image.sh FOLDER. What an earlier try has left there is
# gone on from. TORCH_INDEX is as for the image; MOUNTS names folders of this machine that pip's settings point to.
set -euo pipefail
clone=$(cd "$(dirname "$0")/.." && pwd -P)
root=$(mkdir -p "$1" && cd "$1" && pwd -P)/root
mapfile -t kept < <(env | grep -E '^(PIP_|TORCH_INDEX=|https?_proxy=)')
setting= at=/

inside() { # a command of sh, in the clean root
	# shellcheck disable=SC2016
	unshare --mount bash -euc 'for folder in /dev /proc ${MOUNTS:-}; do
			mkdir -p "$0$folder" && mount --rbind "$folder" "$0$folder"
		done
		exec chroot "$0" env -i HOME=/root PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${@:2}" sh -euc "$1"
		' "$root" "$setting cd $at; $1" "${kept[@]}"
}

if [[ ! -d $root ]]; then # in place of the base image: Debian 13 has its Python, 3.13
	debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip trixie "$root.new" >/dev/null
	rm "$root.new"/usr/lib/python3*/EXTERNALLY-MANAGED && ln -s ../../bin/python3 "$root.new/usr/local/bin/python"
	mv "$root.new" "$root"
fi
for file in /etc/resolv.conf /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do
	if [[ -f $file ]]; then cp -L "$file" "$root$file"; fi
done
while read -r step words <&3; do
	echo "check-image.sh: $step $words"
	case $step in
	WORKDIR) mkdir -p "$root$words" && at=$words ;;
	COPY) mkdir -p "$root$at/${words##* }" && (cd "$clone" && cp ${words% *} "$root$at/${words##* }") ;;
	ENV) setting+="export $words; " ;;
	RUN) inside "$words" ;;
	esac
done 3< <(grep -E '^(WORKDIR|COPY|ENV|RUN) ' "$clone/envs/Dockerfile")
tar --create --directory "$clone" Snakefile config envs pyproject.toml resources src workflow | tar -x -C "$root/work"
inside 'python -c "import diffusers, open_clip, tblite.interface, torchvision, vendi_score, rdkit.Chem.Draw"'
inside 'snakemake --cores 2 --configfile config/smoke.yaml -- results/smoke/tables/theory_threshold.csv \
	results/smoke/runs/risk_averse_2d/pretrained/seed0/model.safetensors'
